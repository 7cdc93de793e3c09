from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.cleaning.decontaminate import DecontaminateSettings, Decontaminator
from data_pipeline.cleaning.view import Finding, TextView
from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings


def check(files: list[Path], text: str, **settings: Any) -> Finding | None:
    plain = {"files": [str(path) for path in files], **settings}
    return Decontaminator(build_settings(DecontaminateSettings, plain, "test"))(TextView(text))


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


@pytest.fixture
def exam(tmp_path: Path) -> Path:
    """Texts of 20, 10, 13 and 3 words."""
    path = tmp_path / "exam.jsonl"
    texts = [words(0, 20), words(100, 10), words(200, 13), words(300, 3)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "\n")
    return path


def test_one_common_ngram_is_found_and_one_less_is_not(exam: Path) -> None:
    finding = check([exam], f"before that {words(4, 13)} after that")
    assert finding == Finding(str(exam), f"0.125 of the n-grams of line 1, first: '{words(4, 13)}'")
    assert check([exam], f"before that {words(4, 12)} after that") is None
    assert check([exam], f"before that {words(4, 12)} after that", ngram=12) is not None


def test_the_document_is_compared_after_light_normalisation(exam: Path) -> None:
    shouted = words(4, 13).upper().replace(" ", ",\n- ")
    finding = check([exam], f"({shouted})!")
    assert finding is not None
    assert finding.detail.endswith(f"'{words(4, 13)}'")


def test_a_short_evaluation_text_is_matched_whole(exam: Path) -> None:
    finding = check([exam], f"x {words(100, 10)} y")
    assert finding == Finding(str(exam), f"1 of the n-grams of line 2, first: '{words(100, 10)}'")
    assert check([exam], f"x {words(100, 9)} y") is None
    assert check([exam], words(100, 10)) is not None


def test_the_shortest_are_not_looked_for(exam: Path) -> None:
    assert check([exam], words(300, 3)) is None
    assert check([exam], words(300, 3), min_units=3) is not None
    assert Decontaminator(DecontaminateSettings(files=(str(exam),))).ignored == 1


def test_min_overlap_is_of_one_evaluation_text(exam: Path) -> None:
    """The first text has 8 distinct 13-grams; the document holds 4 of them: the first 16 words."""
    text = f"{words(0, 16)} and on"
    finding = check([exam], text, min_overlap=0.5)
    assert finding is not None
    assert finding.detail.startswith("0.5 of the n-grams of line 1, first: 'w0 w1 ")
    assert check([exam], text, min_overlap=0.51) is None
    # half of one text and all of another: the other is named
    finding = check([exam], f"{text} {words(200, 13)}")
    assert finding is not None
    assert finding.detail.startswith("1 of the n-grams of line 3, first: 'w200 ")


def test_against_a_plain_search(tmp_path: Path) -> None:
    """Random texts over few words: found exactly when some n-gram is in common, for word tuples compared as tuples."""
    generator = np.random.default_rng(3)
    vocabulary = np.array(["le", "chat", "noir", "dort", "bien"])

    def draw(count: int) -> list[str]:
        return generator.choice(vocabulary, count).tolist()

    def grams(text: list[str], n: int) -> set[tuple[str, ...]]:
        return {tuple(text[start : start + n]) for start in range(len(text) - n + 1)}

    texts = [draw(int(count)) for count in generator.integers(4, 20, 12)]
    (tmp_path / "a.txt").write_text("\n\n".join(map(" ".join, texts)))
    decontaminator = Decontaminator(DecontaminateSettings(files=(str(tmp_path / "a.txt"),), ngram=6, min_units=4))
    found = 0
    for _ in range(400):
        document = draw(int(generator.integers(1, 120)))
        shares = [
            len(own & grams(document, min(6, len(text)))) / len(own)
            for text in texts
            for own in [grams(text, min(6, len(text)))]
        ]
        finding = decontaminator(TextView(" ".join(document)))
        assert (finding is not None) == (max(shares) > 0)
        if finding:
            best = shares.index(max(shares))
            assert finding.detail.startswith(f"{max(shares):.4g} of the n-grams of paragraph {best + 1}, first: ")
            found += 1
    assert 50 < found < 350


def test_characters_for_languages_without_blanks(tmp_path: Path) -> None:
    question = "明月几时有把酒问青天不知天上宫阙"
    (tmp_path / "poem.txt").write_text(question)
    assert check([tmp_path / "poem.txt"], f"诗云{question[2:15]}也", unit="characters") is not None
    assert check([tmp_path / "poem.txt"], f"诗云{question[2:14]}也", unit="characters") is None


def test_kinds_of_files(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as handle:
        handle.write(json.dumps({"question": words(0, 13), "answer": words(50, 13)}))
    (tmp_path / "a.txt").write_text(f"{words(100, 7)}\n{words(107, 6)}\n\n{words(200, 13)}\n")
    files = [tmp_path / "*"]
    found = [check(files, words(first, 13), fields=["question", "answer"]) for first in (0, 50, 100, 200, 300)]
    assert [(finding.reason, finding.detail.split(", first")[0]) if finding else None for finding in found] == [
        (str(tmp_path / "b.jsonl.gz"), "1 of the n-grams of line 1 (question)"),
        (str(tmp_path / "b.jsonl.gz"), "1 of the n-grams of line 1 (answer)"),
        (str(tmp_path / "a.txt"), "1 of the n-grams of paragraph 1"),
        (str(tmp_path / "a.txt"), "1 of the n-grams of paragraph 2"),
        None,
    ]


def test_a_byte_order_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps({"text": words(0, 13)}).encode())
    assert check([tmp_path / "a.jsonl"], words(0, 13)) is not None


PACKED = gzip.compress(" ".join(f"w{number}" for number in range(2000)).encode())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"a\.csv is neither \.jsonl nor \.txt"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', r"line 2 of .*a\.jsonl has no text in field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1 of .*a\.jsonl has no text in field 'text'"),
        ("a.jsonl", b"[1\n", r"line 1 of .*a\.jsonl is not valid JSON"),
        ("a.txt", b"\xff", r"a\.txt can't be read as UTF-8 text"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz can't be read"),
        ("a.jsonl", b"[" * 100_000, r"line 1 of .*a\.jsonl is not valid JSON \(maximum recursion depth"),
        ("a.txt.gz", PACKED[:-20], r"a\.txt\.gz can't be read as UTF-8 text: Compressed file ended"),
        ("a.txt.gz", PACKED[:40] + b"\0\0\0\0" + PACKED[44:], r"a\.txt\.gz can't be read as UTF-8 text: "),
        ("a.txt", b"too short", r"none of the 1 texts in .*a\.txt has 8 words"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        check([tmp_path / name], "text")


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*/none\*' matches no file"):
        check([tmp_path / "none*"], "text")


def test_the_stamp_follows_the_content(exam: Path) -> None:
    settings = DecontaminateSettings(files=(str(exam),))
    before = settings.stamp()
    exam.write_text(exam.read_text().replace("w0", "w1"))
    assert list(before) == [str(exam)]
    assert settings.stamp() != before
