"""Documents without sense, as web text has them: four kinds, a quarter of the documents each.

``characters``: a text's characters in random order. ``words``: a text's words in random order. ``boilerplate``: one of
a few sentences again and again. ``base64``: random bytes, which nothing can predict. The texts are those of the
standard library's documentation; the seed decides everything else.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.sources.base import Document
from data_pipeline.sources.stdlib import StdlibSource
from data_pipeline.storage import StorageSettings

from .common.runs import ROOT, prepare_data

SETTINGS = ROOT / "studies/noise.yaml"
FILE = ROOT / "data/studies_noise_text/noise.jsonl"
DOCUMENTS, CHARACTERS = 400, 2000
SENTENCES = (
    "This site uses cookies. By continuing to browse you agree to our use of cookies. ",
    "All rights reserved. No part of this page may be reproduced without permission. ",
    "Click here to subscribe to our newsletter and never miss an update again! ",
    "You are using an outdated browser. Please upgrade your browser. ",
    "Home | About | Contact | Privacy | Terms of use | Site map ",
    "Log in or register to post comments. Report this comment as spam. ",
)


def _characters(text: str, draw: random.Random) -> str:
    return "".join(draw.sample(text, len(text)))


def _words(text: str, draw: random.Random) -> str:
    words = text.split()
    return " ".join(draw.sample(words, len(words)))


def _boilerplate(text: str, draw: random.Random) -> str:
    return draw.choice(SENTENCES) * (len(text) // 70)


def _base64(text: str, draw: random.Random) -> str:
    return base64.b64encode(draw.randbytes(len(text) * 3 // 4)).decode()


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "characters": _characters,
    "words": _words,
    "boilerplate": _boilerplate,
    "base64": _base64,
}


def documents(texts: Iterator[str], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """``count`` documents, each with its kind; each is made of the next text (of those, all of one length)."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    for number, text in zip(range(count), texts, strict=False):
        kind = kinds[number % len(kinds)]
        yield kind, KINDS[kind](text, draw)


def pieces() -> Iterator[str]:
    """The documentation of the standard library, cut into texts of ``CHARACTERS`` characters."""
    source = StdlibSource(kind="stdlib", part="docs", domain="docs")
    left = ""
    for part in source.parts(1_000_000):
        for document in source.records(part, StorageSettings()):
            left += document.text + "\n" if isinstance(document, Document) else ""
            while len(left) >= CHARACTERS:
                yield left[:CHARACTERS]
                left = left[CHARACTERS:]


def prepare_noise(file: Path = FILE) -> None:
    """Write the documents and make the data set, if it is not there."""
    if (ROOT / "data/studies_noise/manifest.json").exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    made = documents(pieces(), DOCUMENTS, seed=0)
    lines = [json.dumps({"text": text, "url": f"noise:{kind}/{number}"}) for number, (kind, text) in enumerate(made)]
    file.write_text("\n".join(lines) + "\n")
    prepare_data(SETTINGS)
