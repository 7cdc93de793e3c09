"""A third domain for studies of specialization: the C++ headers of c10 that the installed torch brings along.

They are always there and unlike Python's code and documentation; the vocabulary is the studies' own, which no C++ was
in, so that a header takes more tokens a character than they do.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .common.runs import ROOT, prepare_data

SETTINGS = ROOT / "studies/headers.yaml"
FILE = ROOT / "data/studies_headers_text/headers.jsonl"
HEADERS = Path(torch.__file__).parent / "include/c10"


def prepare_headers(file: Path = FILE) -> None:
    """Write the headers as documents and make the data set, if it is not there."""
    if (ROOT / "data/studies_headers/manifest.json").exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lines:
        for header in sorted(HEADERS.rglob("*.h")):
            url = f"c10/{header.relative_to(HEADERS)}"
            lines.write(json.dumps({"text": header.read_text(encoding="utf-8"), "url": url}) + "\n")
    prepare_data(SETTINGS)
