from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import DataError, UserError
from data_pipeline.sources import StdlibSource
from tests.data_pipeline.read_sources import read, texts


def test_stdlib_code_is_a_sorted_prefix_without_tests() -> None:
    source = StdlibSource(kind="stdlib", part="code", domain="code", limit_bytes=300_000)
    documents = read(source, 50_000)
    urls = [url for _, url in documents]
    assert 50_000 < sum(len(text.encode()) for text in texts(documents)) <= 300_000
    assert "stdlib:__future__.py" in urls
    assert not [url for url in urls if "test" in url.split("/")]
    assert documents == read(source, 1) == read(source, 1 << 30)
    longer = source.model_copy(update={"limit_bytes": 600_000})
    assert read(longer, 1 << 30)[: len(documents)] == documents
    with pytest.raises(UserError, match=r"has no module of at most 10 bytes\. Raise limit_bytes"):
        source.model_copy(update={"limit_bytes": 10}).parts(1)


def test_stdlib_docs_are_topics_and_long_docstrings() -> None:
    source = StdlibSource(kind="stdlib", part="docs", domain="docs", limit_bytes=300_000)
    documents = read(source, 50_000)
    by_url = {url: text for text, url in documents}
    assert by_url["pydoc:topics/assert"].lstrip().startswith('The "assert" statement')
    future = by_url["stdlib:__future__.py:1"]
    assert future.startswith("Record of phased-in incompatible language changes.")
    assert all(len(text) > 80 for text, url in documents if url.startswith("stdlib:"))
    assert documents == read(source, 1 << 30)


def test_a_module_that_is_no_python_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text('"""' + "a" * 100 + '"""')
    (tmp_path / "b.py").write_text("def (:")
    (tmp_path / "c.py").write_bytes(b"# coding: no-such-codec")
    monkeypatch.setattr("data_pipeline.sources.stdlib._library", lambda: tmp_path)
    source = StdlibSource(kind="stdlib", part="code", domain="code", on_bad_record="drop")
    assert [url for _, url in read(source, 1)] == ["stdlib:a.py", "stdlib:b.py", "stdlib:c.py"]
    assert texts(read(source, 1))[2] == "(no Python source)"
    docs = source.model_copy(update={"part": "docs"})
    assert texts(read(docs, 1))[-3:] == ["a" * 100, "(no Python source)", "(no Python source)"]
    with pytest.raises(DataError, match=r"b\.py: no Python source \(invalid syntax"):
        read(docs.model_copy(update={"on_bad_record": "stop"}), 1)
