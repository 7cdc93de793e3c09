"""A sweep in one YAML file: a run's configuration, and what its members change."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings, load_settings
from pretrain.config import Config, load_config

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
_OWN = ("run.name", "run.folder")
"""Settings that every member has its own of, from ``name`` and ``folder``."""


class SweepSettings(Settings):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep; its members are runs in ``folder/name``."""
    folder: str = "runs"
    """Folder that holds the sweep, relative to the working directory."""
    base: str = Field(min_length=1)
    """The configuration that all members share, relative to this file."""
    overrides: tuple[str, ...] = ()
    """``section.key=value`` for every member, over the base."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values of keys: every combination is a member."""
    cases: tuple[dict[str, Any], ...] = ()
    """Settings that go together; every case is combined with the whole grid. ``label`` names a case, if it has one."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations to leave out: a member goes that has all values of one of these."""

    @model_validator(mode="after")
    def _check(self) -> SweepSettings:
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} has no values; give some, or take it out")
        if not self.grid and not self.cases:
            raise ValueError("grid and cases are both empty: there is nothing to sweep; give one of them")
        for number, case in enumerate(self.cases):
            if both := sorted(set(case) & set(self.grid)):
                raise ValueError(f"cases.{number} and grid both set {', '.join(both)}; leave it to one of them")
        for number, excluded in enumerate(self.exclude):
            if not any(excluded.items() <= row.items() for row in _combinations(self)):
                raise ValueError(f"exclude.{number} fits no member; mend it, or take it out")
        return self


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    values: dict[str, Any]
    """What it changes, by key; ``label`` of its case, too."""
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run_folder


def load_sweep(path: Path, overrides: tuple[str, ...] = ()) -> tuple[SweepSettings, list[Member]]:
    """Read a sweep and build the configuration of every member.

    Args:
        path: its YAML file.
        overrides: for every member, over the file's own; where a case sets the same, it wins for its members.

    Raises:
        UserError: the file, or the configuration of a member, is wrong; an override would reach no member; two members
            would be one.
    """
    sweep = load_settings(SweepSettings, path)
    rows = expand(sweep)
    for override in (*sweep.overrides, *overrides):
        key = override.partition("=")[0]
        if key in _OWN or (rows and all(key in row for row in rows)):
            reason = "a sweep names its runs and their folders itself" if key in _OWN else f"every member sets {key}"
            raise UserError(
                f"{path}: the override {override} changes nothing: {reason}. Change it in the sweep's file."
            )
    members: dict[str, Member] = {}
    for values in rows:
        name = member_name(values, sweep.grid)
        own = [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "label"]
        where = [f"run.name={name}", f"run.folder={Path(sweep.folder) / sweep.name}"]
        try:
            config = load_config(path.parent / sweep.base, [*sweep.overrides, *overrides, *own, *where])
        except UserError as error:
            raise UserError(f"{path}, member {name}: {error}") from error
        if name in members:
            raise UserError(
                f"{path}: two members would be named {name}: {members[name].values} and {values}. Give the cases a "
                "label, or take a repeated value away."
            )
        members[name] = Member(name, values, config)
    return sweep, list(members.values())


def expand(sweep: SweepSettings) -> list[dict[str, Any]]:
    """What each member changes: every case with every combination of the grid, the last key fastest."""
    return [row for row in _combinations(sweep) if not any(values.items() <= row.items() for values in sweep.exclude)]


def _combinations(sweep: SweepSettings) -> list[dict[str, Any]]:
    rows = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    return [{**case, **row} for case in sweep.cases or ({},) for row in rows]


def member_name(values: dict[str, Any], grid: Iterable[str]) -> str:
    """``label-lr_0.001-layers_4``: each key's last word with its value; a label stands for all that its case sets."""
    label = values.get("label")
    parts = [] if label is None else [str(label)]
    told = grid if parts else values
    parts += [f"{key.rpartition('.')[2]}_{values[key]}" for key in told]
    return "-".join(_UNFIT.sub("_", part).strip("_") for part in parts)
