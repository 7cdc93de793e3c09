"""Typed, closed settings from one YAML file, ``extends:`` and dotted overrides (laws 7 and 8).

The schema is a tree of :class:`Settings` classes (pydantic); merging is OmegaConf's. What this file adds is the
messages: every problem names the key, the value and, for an unknown key or choice, the nearest valid one, and all
problems of a file are reported together.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError

LONGEST_WAIT = 10_000_000
"""Seconds (115 days): what a system call can wait for; an infinite time, or one that a clock can't hold, is refused."""

SettingsType = TypeVar("SettingsType", bound="Settings")


class Settings(BaseModel):
    """Base of every configuration section: closed, immutable, and strict about types (no "1" for 1)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, ser_json_inf_nan="constants"
    )


def load_settings(schema: type[SettingsType], path: Path | str, overrides: Sequence[str] = ()) -> SettingsType:
    """Read ``path``, merge what it extends, apply ``a.b=c`` overrides, and check the result against ``schema``.

    ``extends:`` names one file or a list of files, relative to the file that says so; later ones win, the file
    itself wins over all, and overrides win over the file. Mappings are merged key by key; ``key: null`` takes an
    inherited mapping away. Values of overrides are YAML.

    Raises:
        UserError: the file is missing, is not YAML, extends itself, or does not fit the schema.
    """
    merged = _read_with_extends(Path(path), ())
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"override {override!r}")
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}. Mend the ${{...}} reference it names.") from error
    return build_settings(schema, plain, str(path))


def build_settings(schema: type[SettingsType], plain: Any, origin: str) -> SettingsType:
    """Check a plain dictionary against ``schema``; ``origin`` says in the message where it came from.

    Raises:
        UserError: names every key that does not fit, its value, and the nearest valid key or choice.
    """
    try:
        return schema.model_validate(_tuples(plain))
    except ValidationError as error:
        problems = "; ".join(_explain(schema, problem) for problem in error.errors())
        raise UserError(f"{origin}: {problems}") from error


def _read_with_extends(path: Path, chain: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in chain:
        raise UserError(f"{path}: extends itself through {' -> '.join(str(p) for p in chain)}. Break the circle.")
    if not path.is_file():
        where = f" (extended by {chain[-1]})" if chain else ""
        raise UserError(f"configuration file {path} does not exist{where}. Give the path of a YAML file.")
    try:
        own = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, DictConfig):
        raise UserError(f"{path} holds {type(own).__name__}, not a mapping of sections to settings.")
    bases = own.pop("extends", [])
    merged = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else list(bases):
        merged = _merge(merged, _read_with_extends(path.parent / base, (*chain, path)), str(path))
    return _merge(merged, own, str(path))


def _merge(base: DictConfig, top: DictConfig, origin: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(_without_removed(base, top), top)
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: can't be merged: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _without_removed(base: DictConfig, top: DictConfig) -> DictConfig:
    """``base`` without the mappings that ``top`` sets to null: their keys would have nothing to say any more."""
    kept = OmegaConf.create({})
    for key in base:
        below, above = base[key], top.get(key)
        if key in top and above is None and isinstance(below, DictConfig):
            top.pop(key)
        elif isinstance(below, DictConfig) and isinstance(above, DictConfig):
            kept[key] = _without_removed(below, above)
        else:
            kept[key] = below
    return kept


def _parse_override(override: str) -> DictConfig:
    key, separator, value = override.partition("=")
    if not separator or not key.strip() or key.startswith("-"):
        raise UserError(f"override {override!r} is not of the form section.key=value (for example optimizer.lr=3e-4).")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {override!r}: the value {value!r} is not valid YAML. Quote it.") from error


def _tuples(value: Any) -> Any:
    """Lists as tuples: immutable settings hold tuples, and strict validation does not convert."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    """:func:`_tuples` undone, for messages: what the file says."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


_NO_MAPPING = {"model_type", "model_attributes_type", "dict_type"}


def _explain(schema: type[BaseModel], problem: Any) -> str:
    spelled, owner, annotation = _follow(schema, problem["loc"])
    key = ".".join(spelled)
    kind, value = problem["type"], _lists(problem["input"])
    if kind == "extra_forbidden":
        known = sorted(owner.model_fields) if owner else []
        return f"unknown key {key!r} (value {value!r}){nearest(spelled[-1], known)}"
    if kind == "missing":
        return f"{key!r} is missing and has no default"
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = problem["ctx"]["discriminator"].strip("'")
        known = sorted(choice for option in _classes(annotation) for choice in _tags(option))
        if kind == "union_tag_not_found":
            return f"{key!r} has no {tag}; known: {', '.join(known)}"
        return f"unknown {tag} {value[tag]!r} of {key!r}{nearest(str(value[tag]), known)}"
    where = repr(key) if key else "the configuration"
    if kind in _NO_MAPPING:
        example = f", for example {spelled[-1]}: {_example(annotation)}" if key else ""
        return f"{where} = {value!r}: expected a mapping of settings{example}"
    if kind == "tuple_type":
        return f"{where} = {value!r}: expected a list, for example {spelled[-1]}: {_list_of(value)}"
    hint = ""
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        hint = nearest(str(value), choices)
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where} = {value!r}: {message}{hint}"


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when a known word is near, else the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _follow(schema: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], type[BaseModel] | None, Any]:
    """Follow a validation location through the annotations.

    Returns:
        The keys as a file spells them: without the ``kind`` that pydantic adds for the member of a union; the
        settings class that the last key is looked up in; the annotation of what the location names.
    """
    spelled: list[str] = []
    owner: type[BaseModel] | None = None
    current: Any = schema
    for part in location:
        options = list(_options(current))
        chosen = [option for option in options if part in _tags(option)] if len(options) > 1 else []
        if chosen:
            current = chosen[0]
            continue
        spelled.append(str(part))
        owner = next((option for option in options if _is_settings(option)), None)
        current = next((inner for option in options if (inner := _inside(option, part)) is not None), None)
    return spelled, owner, current


def _inside(annotation: Any, part: Any) -> Any:
    """The annotation of a key of a settings class or a dictionary, or of an item of a tuple; None: there is none."""
    if _is_settings(annotation):
        return annotation.model_fields[part].annotation if part in annotation.model_fields else None
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return arguments[1]
    if typing.get_origin(annotation) is tuple and isinstance(part, int):
        return arguments[0] if arguments[-1] is Ellipsis else arguments[part]
    return None


def _options(annotation: Any) -> Iterator[Any]:
    """What an annotation allows: the members of a union, without None."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _options(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _options(argument)
    elif annotation is not types.NoneType:
        yield annotation


def _example(annotation: Any) -> str:
    """The least that has the shape of ``annotation``, in YAML."""
    options = list(_options(annotation))
    if tags := sorted(tag for option in options for tag in _tags(option)):
        return f"{{kind: {tags[0]}, ...}}"
    option = options[0] if options else None
    if typing.get_origin(option) is dict:
        return f"{{NAME: {_example(typing.get_args(option)[1])}}}"
    if _is_settings(option):
        needed = (name for name, field in option.model_fields.items() if field.is_required())
        return f"{{{', '.join(f'{name}: ...' for name in needed)}}}"
    return "..."


def _list_of(value: Any) -> str:
    """What was meant, where a list was: ``value`` as its one item, in YAML."""
    inner = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return f"[{inner.removesuffix('...' + chr(10)).strip()}]"


def _is_settings(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tags(candidate: Any) -> tuple[Any, ...]:
    """The values of ``kind`` that mean ``candidate`` in a union of settings classes."""
    field = candidate.model_fields.get("kind") if _is_settings(candidate) else None
    return typing.get_args(field.annotation) if field else ()


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _classes(argument)
