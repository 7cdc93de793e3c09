"""The page itself: template, style, script and Plotly in one file that needs no network."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from data_pipeline.errors import UserError
from data_pipeline.files import publish_bytes

from . import summary
from .figures import make_figures
from .run import Run, read_run
from .series import POINTS

REPORT_FILE = "report.html"
_SECTIONS = {
    "training": "Training",
    "weights": "Sample weights",
    "experts": "Experts",
    "blocks": "Experts, block by block",
    "speed": "Speed",
    "others": "Further numbers",
}
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_folder: Path) -> Path:
    """Write ``run_folder/report.html`` from the folder's files and return its path; also while the run goes on.

    Raises:
        UserError: the folder is no run folder, can't be written, or one of its files is damaged.
    """
    page = render(read_run(run_folder), now=time.time())
    path = run_folder / REPORT_FILE
    try:
        publish_bytes(path, page.encode())
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error.strerror or error}. Free space there or mend its permissions, "
            "then ask for the report again."
        ) from error
    return path


def render(run: Run, now: float) -> str:
    """The page as HTML; ``now`` is the Unix time it says it was made at."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = make_figures(run)
    incidents = summary.incidents(run)
    return environment.get_template("page.html").render(
        run=run,
        state=summary.state(run, now),
        tiles=summary.tiles(run),
        heldout=summary.heldout_rows(run),
        loss_unit=run.loss_unit,
        attempts=summary.attempt_rows(run),
        versions=summary.versions(run),
        incidents=summary.incident_rows(incidents),
        all_incidents=len(incidents),
        sections=[
            (key, title, [figure for figure in figures if figure.section == key]) for key, title in _SECTIONS.items()
        ],
        figures=[asdict(figure) for figure in figures],
        thinned=len(run.steps) > POINTS,
        points=POINTS,
        made=summary.moment(now),
        style=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )
