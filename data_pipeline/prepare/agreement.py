"""What all starts and tasks of one `prepare` must agree on: settings, input, tokenizer, and the libraries that decide
what becomes of a text."""

from __future__ import annotations

import importlib.metadata
import sys
import unicodedata
from pathlib import Path
from typing import Any

from ..errors import DataError, UserError
from ..files import publish_bytes, sha256_file
from ..storage import impatient
from ..tokenizer import Tokenizer
from .checked_files import publish_record, read_record
from .claims import Share, claim
from .parts import make_cleaner
from .settings import PrepareSettings
from .train_tokenizer import train_tokenizer
from .workspace import Workspace

FORMAT = 2
"""Of the files that the passes leave to each other; another one can't be continued from."""

Stamps = dict[str, dict[str, Any]]
"""Of each source: what shows that its input changed."""


def input_stamps(settings: PrepareSettings) -> Stamps:
    """The stamps of all sources as their input is now.

    Raises:
        UserError: input is missing or unreadable; file names do not mean the same here as elsewhere.
        StorageError: a server does not answer.
    """
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise UserError(
            f"file names are read as {encoding} under this locale, so that what a data set holds would hang on it. Set "
            "PYTHONUTF8=1, or a UTF-8 locale (LC_ALL=C.UTF-8), and start again."
        )
    with impatient(settings.storage) as storage:
        return {name: source.stamp(storage) for name, source in settings.sources.items()}


def text_versions() -> dict[str, str]:
    """Versions that decide what becomes of a text: normalisation and words hang on Unicode's, tokens on
    SentencePiece's."""
    return {"sentencepiece": importlib.metadata.version("sentencepiece"), "unicode": unicodedata.unidata_version}


def agree_on_plan(
    settings: PrepareSettings, workspace: Workspace, stamps: Stamps, tokenizer: Tokenizer, share: Share
) -> None:
    """Put on record what parts and shards are made of, or check that it is what an earlier start put there.

    Raises:
        UserError: names what differs.
    """
    plan = {"settings": settings.agreed, "part_bytes": settings.part_bytes, "tokenizer": tokenizer.sha256}
    workspace.agree("plan", {**plan, "input": stamps, **_evaluation_texts(settings)}, share)


def check_evaluation_texts(settings: PrepareSettings, workspace: Workspace) -> None:
    """Look, when all parts are done, whether the evaluation texts are still those that were agreed on.

    Raises:
        UserError: they changed meanwhile, so that parts may have been compared with either.
    """
    agreed = read_record(workspace.work / "plan.json")
    if agreed.get("evaluation_texts", {}) != _evaluation_texts(settings).get("evaluation_texts", {}):
        raise UserError(
            f"{settings.output}: the evaluation texts of `decontaminate.files` changed while documents were compared "
            "with them. Put them back, delete the output folder and prepare again."
        )


def check_inputs(settings: PrepareSettings, workspace: Workspace) -> None:
    """Look, when all parts are done, whether what can't be compared part by part is still what was agreed on.

    Raises:
        UserError: it changed meanwhile, so that parts may have been read of either.
    """
    agreed = read_record(workspace.work / "plan.json")["input"]
    for name, source in settings.sources.items():
        if source.compared_at_the_end and source.stamp(settings.storage) != agreed[name]:
            raise UserError(
                f"{settings.output}: what source {name!r} reads changed while it was read. Put it back (on the hub: "
                "name a `revision`), delete the output folder and prepare again."
            )


def agree_on_versions(workspace: Workspace, share: Share) -> None:
    """The same for :func:`text_versions` and :data:`FORMAT`; a data set that is complete needs none of them any more.

    Raises:
        UserError: names what differs.
    """
    workspace.agree("versions", {"format": FORMAT, **text_versions()}, share)


def obtain_tokenizer(settings: PrepareSettings, workspace: Workspace, stamps: Stamps, share: Share) -> Tokenizer:
    """The data set's tokenizer: the one that is there, or the one trained, or taken from a file, now.

    Raises:
        UserError: there is one of unknown origin, or what it was made from is not what is asked for now.
    """
    wanted: dict[str, Any] = {"tokenizer": settings.tokenizer.model_dump(mode="json")}
    with claim(workspace.claims, "the tokenizer", share, wait=True):
        if workspace.tokenizer.exists() and not (workspace.work / "tokenizer.json").exists() and not workspace.begun:
            raise UserError(
                f"{workspace.tokenizer} was not made here, so it is unknown from what. Move it elsewhere and name it "
                "as tokenizer.path."
            )
        if settings.tokenizer.path is not None:
            tokenizer = Tokenizer.load(Path(settings.tokenizer.path))
            workspace.agree("tokenizer", {**wanted, "sha256": tokenizer.sha256}, share)
            if not workspace.tokenizer.exists():
                _publish_tokenizer(workspace, tokenizer)
                return tokenizer
            return _stored_tokenizer(workspace)
        assert settings.tokenizer.train is not None
        wanted |= {
            "sources": settings.agreed["sources"],
            "source_order": settings.agreed["source_order"],
            "heldout_fraction": settings.heldout_fraction,
            "input": stamps,
            "cleaning": settings.cleaning.of_documents,
            **_evaluation_texts(settings),
        }
        workspace.agree("tokenizer", wanted, share)
        if workspace.tokenizer.exists():
            return _stored_tokenizer(workspace)
        tokenizer = train_tokenizer(
            settings.tokenizer.train,
            settings.sources,
            settings.heldout_fraction,
            make_cleaner(settings.cleaning),
            settings.storage,
        )
        _publish_tokenizer(workspace, tokenizer)
        return tokenizer


def _publish_tokenizer(workspace: Workspace, tokenizer: Tokenizer) -> None:
    """Publish the tokenizer, after what will show that it is the one."""
    publish_record(workspace.tokenizer_hash, tokenizer.sha256)
    publish_bytes(workspace.tokenizer, tokenizer.model)


def _stored_tokenizer(workspace: Workspace) -> Tokenizer:
    """The tokenizer of the data set folder, which must be the one that was put there.

    Raises:
        DataError: it is another one.
    """
    if sha256_file(workspace.tokenizer) != read_record(workspace.tokenizer_hash):
        raise DataError(
            f"{workspace.tokenizer} was damaged or replaced: it is not the tokenizer that the data set was begun with. "
            "Put that one back, or delete the folder and prepare again."
        )
    return Tokenizer.load(workspace.tokenizer)


def _evaluation_texts(settings: PrepareSettings) -> dict[str, Any]:
    """The files that decontamination reads, by their content."""
    decontaminate = settings.cleaning.decontaminate
    return {"evaluation_texts": decontaminate.stamp()} if decontaminate else {}
