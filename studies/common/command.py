"""The command line of a study: which size, do or only report, and where text and plots go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .docs import put_section
from .plots import Plot, write_plots
from .runs import ROOT, Run, Study, whole_seeds

Size = TypeVar("Size")
Found = TypeVar("Found")
Results = list[dict[str, Any]]
Do = Callable[[Sequence[Run]], Results]
"""Does runs and returns the results of all that are known; with ``--report`` it does none."""


def known_runs(
    runs: Callable[[Size], Sequence[Run]], *prepare: Callable[[], object]
) -> Callable[[Size, Do], tuple[Results, str]]:
    """The ``collect`` of a study all of whose runs are known beforehand; ``prepare`` makes their data."""

    def collect(size: Size, do: Do) -> tuple[Results, str]:
        for make in prepare:
            make()
        return whole_seeds(runs(size), do(runs(size)))

    return collect


def study_command(
    name: str,
    description: str | None,
    sizes: Mapping[str, Size],
    collect: Callable[[Size, Do], tuple[Found, str]],
    report: Callable[[Found, Size], tuple[str, list[Plot]]],
) -> None:
    """Parse the arguments and do what they say.

    Args:
        name: of the study; its results, pages and section of docs/studies.md are named so.
        description: for ``--help``.
        sizes: ``default``, ``short`` and ``large``.
        collect: does the runs of a size; what is to be reported, and a sentence on what is missing.
        report: the section and the plots.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--short", action="store_true", help="a trial of minutes; docs/studies.md stays as it is")
    which.add_argument("--large", action="store_true", help="the setting for a GPU")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="of the seeds that are done; starts no run")
    arguments = parser.parse_args()
    chosen = "short" if arguments.short else "large" if arguments.large else "default"

    commits: set[str] = set()

    def do(runs: Sequence[Run]) -> Results:
        study = Study(name, runs)
        results = study.results() if arguments.report else study.do(arguments.at_once)
        commits.update(each["commit"] for each in results)
        return results

    found, missing = collect(sizes[chosen], do)
    text, plots = report(found, sizes[chosen])
    text = f"{text.strip()}\n\n{missing}".strip()
    print(text)
    page = ROOT / f"runs/studies/{name}_{chosen}.html"
    write_plots(page, plots)
    print(f"plots: {page}")
    if not arguments.short:
        suffix, option = ("_large", " --large") if arguments.large else ("", "")
        put_section(f"{name}{suffix}", text, f"python -m studies.{name}{option}", commits)
