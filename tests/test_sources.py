"""Where text comes from, what is said of a bad source, and how bytes that are no text are read."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from membench import corpus, quality
from membench.builtin.models.no_model import NoModel
from membench.builtin.workloads.train import Train
from membench.corpus import Words
from membench.data import tokens
from membench.data.arrow import pyarrow
from membench.data.sources import documents, problem
from membench.data.storage import Damaged
from membench.plugins import Unsuitable
from membench.stand_in import StandIn

if TYPE_CHECKING:
    from torch import nn

_TEXTS = ["First, a line.", "", "Zweitens: größer als 1 €.", "third"]
_BYTES = [text.encode() for text in _TEXTS if text]


def _parquet(path: Path, columns: dict[str, Sequence[Any]], **options: Any) -> Path:
    arrow = pyarrow()
    arrow.parquet.write_table(arrow.table(columns), path, **options)
    return path


def _datasets() -> ModuleType:
    pytest.importorskip("datasets", reason="'datasets' is an extra")
    return importlib.import_module("datasets")


def _refused(source: Path) -> str:
    with pytest.raises((Unsuitable, Damaged)) as caught:
        documents(str(source), None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_topics_are_the_paragraphs_of_the_built_in_training_text() -> None:
    assert problem("topics") is None
    assert b"".join(documents("topics", None)) == corpus.split()[0] + b"\n\n"


def test_nothing_that_is_held_out_stands_in_the_library() -> None:
    text = b"".join(documents("library", None))
    lines = {line for line in corpus.split()[1].splitlines() if len(line) > 60}
    assert len(lines) > 50
    assert sum(line in text for line in lines) < len(lines) / 20  # docstrings share a line or two with the help


def test_library_is_the_source_of_pythons_own_library() -> None:
    assert problem("library") is None
    found = documents("library", 2**20)
    assert Path(importlib.__file__).parent.parent.joinpath("__future__.py").read_bytes() in found


@pytest.mark.parametrize("size", [1024, 2000, 100_000])
@pytest.mark.parametrize("source", ["topics", "library"])
def test_a_size_cuts_exactly(source: str, size: int) -> None:
    found, more = documents(source, size), documents(source, size + 1)
    assert sum(map(len, found)) == size
    assert b"".join(more)[:size] == b"".join(found)
    assert all(found)


def test_a_size_that_is_more_than_there_is_takes_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert documents(str(tmp_path), 1024) == [b"abc"]


def test_a_folder_gives_its_text_files_by_name_and_no_others(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.py", "sub/a.csv", "image.png", "none.txt", "z.html", "README"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if name == "none.txt" else name.encode())
    assert problem(str(tmp_path)) is None
    assert documents(str(tmp_path), None) == [b"a.md", b"b.txt", b"c.py", b"sub/a.csv", b"z.html"]


def test_a_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"abc")
    assert (problem("~/texts"), documents("~/texts", None)) == (None, [b"abc"])


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_row_of_parquet_is_a_document_and_one_without_text_is_none(tmp_path: Path, compression: str) -> None:
    texts = [*_TEXTS[:2], None, *_TEXTS[2:]]
    _parquet(tmp_path / "part-1.parquet", {"id": range(5), "text": texts}, compression=compression, row_group_size=2)
    _parquet(tmp_path / "part-2.parquet", {"text": ["last"]})
    assert problem(str(tmp_path)) is None
    assert documents(str(tmp_path), None) == [*_BYTES, b"last"]


def test_what_datasets_saved_is_read_row_by_row(tmp_path: Path) -> None:
    _datasets().Dataset.from_dict({"id": [1, 2, 3, 4, 5], "text": [*_TEXTS, None]}).save_to_disk(tmp_path / "saved")
    assert problem(str(tmp_path / "saved")) is None
    assert documents(str(tmp_path / "saved"), None) == _BYTES


def test_of_several_data_sets_one_must_be_named(tmp_path: Path) -> None:
    datasets = _datasets()
    one = datasets.Dataset.from_dict({"text": ["abc"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "all")
    assert problem(str(tmp_path / "all")) == (
        f"'{tmp_path}/all' holds what datasets saved; name the folder of one: test, train"
    )
    assert problem(str(tmp_path / "all" / "train")) is None


def test_a_source_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    neither = "is neither topics nor library, nor a folder here"
    assert problem("topic") == f"'topic' {neither}"
    assert problem("") == f"'' {neither}"
    assert problem(str(tmp_path / "file.txt")) == f"'{tmp_path}/file.txt' {neither}"
    assert problem(str(tmp_path / "empty")) == (
        f"'{tmp_path}/empty': there is no text in that folder (.txt, .md, .py, .json, .jsonl, .html, .csv or .parquet)"
    )
    for strange in ("~nobody-of-this-name/x", "x" * 5000, "a\0b"):
        assert problem(strange)


def test_text_that_is_empty_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    _parquet(tmp_path / "b.parquet", {"text": ["", None]})
    assert _refused(tmp_path) == f"there is no text in {tmp_path}: all of it is empty"


def test_a_table_without_text_is_named_with_the_columns_that_it_has(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    assert _refused(tmp_path) == f"{path} has no column 'text', but 'body', 'id'"
    path = _parquet(tmp_path / "0.parquet", {"text": [1, 2]})
    documents.cache_clear()
    assert _refused(tmp_path) == f"{path}: column 'text' holds int64, and text is wanted"


def test_a_data_set_without_text_is_named_with_the_columns_that_it_has(tmp_path: Path) -> None:
    make = _datasets().Dataset.from_dict
    make({"body": ["x"], "id": [1]}).save_to_disk(tmp_path / "a")
    assert _refused(tmp_path / "a") == f"{tmp_path}/a has no column 'text', but 'body', 'id'"
    make({"text": [[1], [2]]}).save_to_disk(tmp_path / "b")
    assert re.fullmatch(f"{tmp_path}/b: column 'text' holds .*, and text is wanted", _refused(tmp_path / "b"))


@pytest.mark.parametrize("size", [0, 8, 100])
def test_parquet_that_is_cut_off_is_damaged_and_named(tmp_path: Path, size: int) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": _TEXTS})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Damaged, match=f"^{path}: "):
        documents(str(tmp_path), None)


def test_a_library_that_is_missing_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": _TEXTS})
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("dataset_info.json", "state.json"):
        (saved / name).write_text("{}")
    wants = "which is not installed: pip install"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert _refused(saved) == f"reading {saved} wants 'datasets', {wants} 'membench[datasets]'"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert _refused(tmp_path) == f"reading {path} wants 'pyarrow', {wants} 'membench[data]'"


_NOT_UTF8 = b"caf\xe9 \xff\xfe caf\xe9 \xe2\x82 \xe2\x82\xac"
"""A Latin-1 letter, two bytes that begin nothing, the letter again, two thirds of a euro sign, and a whole one."""


def _encoded(documents: Sequence[bytes], vocabulary: int) -> list[Any]:
    model = NoModel(vocabulary_size=vocabulary)
    return tokens.encoded(documents, model, vocabulary, lambda: Words(documents))


def test_bytes_that_are_no_utf8_are_bytes_to_a_vocabulary_of_bytes() -> None:
    (found,) = _encoded([_NOT_UTF8], 256)
    assert bytes(found.tolist()) == _NOT_UTF8


def test_bytes_that_are_no_utf8_are_replacement_characters_to_a_vocabulary_of_words() -> None:
    (found,) = _encoded([_NOT_UTF8], 1000)
    words = ["caf", "\ufffd", " ", "\ufffd", "\ufffd", " ", "caf", "\ufffd", " ", "\ufffd", " ", "€"]
    assert len(found) == len(words)
    assert [found[place] == found[1] for place in range(len(words))] == [word == "\ufffd" for word in words]
    assert [found[place] == found[2] for place in range(len(words))] == [word == " " for word in words]


def test_words_are_numbered_by_how_often_they_occur_over_all_documents() -> None:
    found = _encoded([b"b a,a", b"a c"], 300)
    # "a" three times, " " twice, then once each in the order of their coming: b , c
    assert [document.tolist() for document in found] == [[2, 1, 0, 3, 0], [0, 1, 4]]


def test_less_text_and_held_out_text_have_the_ids_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some some some words")
    (tmp_path / "b.txt").write_bytes(b"other words words words words")
    model, words = NoModel(vocabulary_size=300), tokens.words_of(str(tmp_path), None)
    # "words" five times, " " seven times, "some" three times, "other" once
    (found,) = tokens.encoded([b"other words"], model, 300, lambda: words)
    assert found.tolist() == [3, 0, 1]
    assert words.ranks(b"unheard words").tolist() == [4, 0, 1]

    class OfWords(StandIn):
        def vocabulary(self, module: nn.Module) -> int:
            return 300

    workload = Train.model_validate({"data": str(tmp_path)})
    ids = [token for piece in quality.pieces(OfWords(), OfWords().skeleton(), workload) for token in piece.ids]
    assert {0, 4} <= set(ids) <= {0, 1, 2, 3, 4}
