"""What the studies share: runs that are kept when done, intervals over seeds, plots, and tables in docs/studies.md."""

from .docs import put_section, table
from .plots import Curve, Plot, write_plots
from .runs import Run, Study
from .statistics import (
    Interval,
    Result,
    Verdict,
    chosen,
    final_loss,
    interval,
    marked,
    seed_by_seed,
    seeds_told,
    shown,
    verdict,
)
from .trainings import Trainings

__all__ = [
    "Curve",
    "Interval",
    "Plot",
    "Result",
    "Run",
    "Study",
    "Trainings",
    "Verdict",
    "chosen",
    "final_loss",
    "interval",
    "marked",
    "put_section",
    "seed_by_seed",
    "seeds_told",
    "shown",
    "table",
    "verdict",
    "write_plots",
]
