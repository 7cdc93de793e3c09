"""What the studies share: runs that are kept when done, intervals over seeds, plots, and tables in docs/studies.md."""

from .docs import put_section, table
from .plots import Curve, Plot, write_plots
from .runs import Run, Study
from .statistics import Interval, interval, marked, shown

__all__ = [
    "Curve",
    "Interval",
    "Plot",
    "Run",
    "Study",
    "interval",
    "marked",
    "put_section",
    "shown",
    "table",
    "write_plots",
]
