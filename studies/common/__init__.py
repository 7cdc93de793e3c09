"""What the studies share: runs that are kept when done, intervals over seeds, plots, and tables in docs/studies.md."""

from .docs import put_section, table
from .plots import Curve, Plot, write_plots
from .runs import Run, Study
from .statistics import Interval, interval, marked, seeds_told, shown

__all__ = [
    "Curve",
    "Interval",
    "Plot",
    "Run",
    "Study",
    "interval",
    "marked",
    "put_section",
    "seeds_told",
    "shown",
    "table",
    "write_plots",
]
