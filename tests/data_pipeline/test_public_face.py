"""What the package exports, and that asking for little imports little."""

from __future__ import annotations

import subprocess
import sys

import pytest

import data_pipeline


def test_the_public_face_is_complete() -> None:
    for name in data_pipeline.__all__:
        assert getattr(data_pipeline, name).__name__ == name
        assert name in dir(data_pipeline)
    with pytest.raises(AttributeError, match="module 'data_pipeline' has no attribute 'nothing'"):
        _ = data_pipeline.nothing


def test_the_public_face_is_light() -> None:
    program = (
        "import sys, data_pipeline, data_pipeline.errors, data_pipeline.settings\n"
        "from data_pipeline import Order, TokenSource, UserError, read_manifest\n"
        "print('torch' in sys.modules, 'sentencepiece' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "False False\n"
