"""Methods found by themselves: one file in a package is one method, its settings class the way to it.

A package of methods (reweighting strategies, parameterizations of a linear layer, optimizers) holds one module for
each. The module defines a subclass of the package's base settings with ``kind: Literal["name"]``; nothing else has to
name it. The field of the configuration that chooses a method is the union of these classes.
"""

from __future__ import annotations

import functools
import importlib
import operator
import pkgutil
import typing
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from data_pipeline.settings import Settings


def choice_of(package: str, base: type[Settings], default: str | None = None) -> Any:
    """The annotation of a field that chooses one of the methods of ``package``.

    In a configuration it is a mapping with ``kind``, or the kind alone where the method's other settings have
    defaults. Where ``default`` is given, a mapping without ``kind`` means that one.

    Args:
        package: full name of the package whose modules are searched.
        base: what the settings of every method derive from.
        default: the kind of a mapping that names none.
    """
    classes = sorted(_classes(package, base), key=lambda found: typing.get_args(found.model_fields["kind"].annotation))
    union: Any = functools.reduce(operator.or_, classes)
    if len(classes) > 1:
        union = Annotated[union, Field(discriminator="kind")]

    def spelled_out(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        if default is not None and isinstance(value, dict) and "kind" not in value:
            return {"kind": default, **value}
        return value

    return Annotated[union, BeforeValidator(spelled_out)]


def _classes(package: str, base: type[Settings]) -> list[type[Settings]]:
    found = []
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        module = importlib.import_module(entry.name)
        found += [
            each
            for each in vars(module).values()
            if isinstance(each, type) and issubclass(each, base) and each.__module__ == entry.name
            if typing.get_args(each.model_fields["kind"].annotation)
        ]
    return found
