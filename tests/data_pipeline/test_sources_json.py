"""JSON lines are read by orjson, and come out as the standard library reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.sources import Document, JsonlSource
from data_pipeline.sources.records import DEEPEST_JSON

NUMBERS = ["0", "-0", "-0.0", "1e5", "1E+2", "1e22", "5e-324", "2e-324", "1e999", "-1e999", "NaN", "-Infinity"]
NUMBERS += ["01", "1.", ".5", "+1", "123456789012345678901.5", "9007199254740993.0"]
NUMBERS += [str(sign * ((1 << bits) + more)) for bits in (53, 63, 64, 80) for more in (-1, 0, 1) for sign in (1, -1)]
STRINGS = ['"a"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\x7f"', '"\x01"', '"\\x"', "'a'", '"\u2581\ufeff"']
scalars = st.one_of(
    st.sampled_from([*NUMBERS, *STRINGS, "null", "true", "None"]),
    st.text().map(json.dumps),
    st.floats().map(json.dumps),
    st.integers(-(1 << 70), 1 << 70).map(str),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(st.sampled_from(['"a"', '"b"', '"\\ud800"']), inner), max_size=3).map(
            lambda pairs: "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"
        ),
    ),
    max_leaves=6,
)
# a field may stand twice; a text is mostly a string
fields = st.lists(
    st.one_of(
        st.tuples(st.just('"text"'), st.one_of(st.sampled_from(STRINGS), st.text().map(json.dumps), values)),
        st.tuples(st.sampled_from(['"score"', '"other"']), values),
    ),
    max_size=5,
)


def as_json_reads(line: bytes) -> tuple[str, str] | None:
    """Text and metadata (in Python's notation, so that 1 is not 1.0), by the standard library alone."""
    try:
        record: Any = json.loads(line.decode("utf-8"))
        text = record["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return text, repr({"score": record["score"]} if "score" in record else None)


def as_headrace_reads(path: Path, line: bytes) -> tuple[str, str] | None:
    path.write_bytes(line + b"\n")
    source = JsonlSource.model_validate(
        {
            "kind": "jsonl",
            "domain": "d",
            "files": (str(path),),
            "metadata_fields": ("score",),
            "on_bad_record": "drop",
        }
    )
    (record,) = [record for part in source.parts(1 << 20) for record in source.read(part)]
    return (record.text, repr(record.metadata)) if isinstance(record, Document) else None


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=fields, seed=st.none() | st.integers(0, 1 << 32))
def test_records_are_those_of_the_standard_library(tmp_path: Path, pairs: list[tuple[str, str]], seed: int) -> None:
    line = ("{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}").encode("utf-8", "surrogatepass")
    if seed is not None:  # one byte is damaged
        place = random.Random(seed)
        changed = bytearray(line)
        changed[place.randrange(len(line))] = place.choice(b'\x00\x0b "{}[]\\,:0e.\xc3\xff\xed')
        line = bytes(changed)
    assert as_headrace_reads(tmp_path / "a.jsonl", line) == as_json_reads(line)


@pytest.mark.parametrize(
    "line",
    [
        *(f'{{"text": "a", "score": {number}}}'.encode() for number in NUMBERS),
        *(f'{{"text": "a", "score": [{number}]}}'.encode() for number in NUMBERS),
        *(f'{{"text": {string}, "score": 1}}'.encode() for string in STRINGS),
        *(f'{{"text": "a", "other": {string}}}'.encode() for string in STRINGS),
        b'{"text": "a", "text": "b", "score": 1, "score": 2}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "a"} x',
        b'{"text": "a"}\x00',
        b'\xc2\xa0{"text": "a"}',
        b'{"text": "a", "score": ' + b"[" * 1010 + b"]" * 1010 + b"}",
        b'{"text": "a", "score": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'["text", "score"]',
        b'"text score"',
        b"null",
        b"1",
    ],
)  # fmt: skip
def test_corners_are_those_of_the_standard_library(tmp_path: Path, line: bytes) -> None:
    assert as_headrace_reads(tmp_path / "a.jsonl", line) == as_json_reads(line)


@pytest.mark.parametrize("value", ["[", '{"a":', '{"a": NaN, "b": ['])
def test_how_deep_json_may_be_nested_hangs_on_nothing_else(tmp_path: Path, value: str) -> None:
    """Python's own bound is what is left of its stack: less in a process that was called from further down."""

    def at_depth(frames: int, line: bytes) -> tuple[str, str] | None:
        return at_depth(frames - 1, line) if frames else as_headrace_reads(tmp_path / "a.jsonl", line)

    def nested(depth: int) -> bytes:
        levels = (
            -(-depth // value.count("[")) if value.count("{") == 0 else depth // (value.count("{") + value.count("["))
        )
        closed = "".join({"[": "]", "{": "}"}[sign] for sign in reversed(value) if sign in "[{")
        return f'{{"text": "a", "score": {value * levels}1{closed * levels}}}'.encode()

    for depth, read in ((DEEPEST_JSON - 1, True), (DEEPEST_JSON + 1, False), (940, False), (3000, False)):
        line = nested(depth)
        assert (as_headrace_reads(tmp_path / "a.jsonl", line) is not None) == read, depth
        assert (at_depth(250, line) is not None) == read, depth
    brackets = json.dumps({"text": "[{" * 3000 + '"\\', "score": [["[" * 600]]})
    assert as_headrace_reads(tmp_path / "a.jsonl", brackets.encode()) == as_json_reads(brackets.encode())
