"""Sections of docs/studies.md that a study writes itself, between markers, with the commit and the command."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from .runs import ROOT, commit

PAGE = ROOT / "docs/studies.md"
HEADING = """# Studies

Small models on real text: what the methods do, measured here. Each section is written by the command it names; a
result that contradicts a paper stands as it is. Intervals are 95 % of Student's t over the seeds.
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def put_section(name: str, text: str, command: str, commits: Collection[str] = (), page: Path = PAGE) -> None:
    """Put ``text`` between the markers of ``name``, or at the end of the page where it has none yet.

    Args:
        text: Markdown that begins with its heading.
        command: as typed; it is named with commit, machine and versions.
        commits: those at which runs were measured; now's where nothing was kept from before.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    measured = (
        f"`{command}`, commit {', '.join(sorted(commits)) or commit()}; {os.cpu_count()} cores ({platform.machine()})"
        f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}, Python "
        f"{sys.version.split()[0]}, torch {torch.__version__}"
    )
    section = f"{begin}\n{text.strip()}\n\n{measured}.\n{end}\n"
    content = page.read_text() if page.exists() else HEADING
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end) + "\n", re.DOTALL)
    written = marked.search(content) is not None
    page.write_text(marked.sub(lambda _: section, content) if written else f"{content.rstrip()}\n\n{section}")
