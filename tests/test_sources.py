"""Where text comes from, what is said of a bad source, and how bytes that are no text are read."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

import membench
from membench.builtin.models.no_model import NoModel
from membench.builtin.workloads.train import Train
from membench.data import corpus, sources, tokens
from membench.data.arrow import pyarrow
from membench.data.corpus import Words
from membench.data.sources import documents, problem
from membench.plugins import DoesNotFit, Unsuitable
from membench.plugins.storage import Damaged
from membench.records.record import Record
from membench.worker import quality
from membench.worker.rehearsal_model import RehearsalModel

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
    assert _refused(tmp_path) == f"{path}: column 'text' holds int64; expected text"


def test_a_data_set_without_text_is_named_with_the_columns_that_it_has(tmp_path: Path) -> None:
    make = _datasets().Dataset.from_dict
    make({"body": ["x"], "id": [1]}).save_to_disk(tmp_path / "a")
    assert _refused(tmp_path / "a") == f"{tmp_path}/a has no column 'text', but 'body', 'id'"
    make({"text": [[1], [2]]}).save_to_disk(tmp_path / "b")
    assert re.fullmatch(f"{tmp_path}/b: column 'text' holds .*; expected text", _refused(tmp_path / "b"))


@pytest.mark.parametrize("size", [0, 8, 100])
def test_parquet_that_is_cut_off_is_damaged_and_named(tmp_path: Path, size: int) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": _TEXTS})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Damaged, match=f"^{path}: "):
        documents(str(tmp_path), None)


def test_whatever_byte_of_a_page_or_its_header_changes_the_text_is_right_or_the_file_named(tmp_path: Path) -> None:
    texts: dict[str, Sequence[Any]] = {"text": [*_TEXTS, *(f"text {number}" for number in range(16))]}
    path = _parquet(tmp_path / "a.parquet", texts, compression="zstd", row_group_size=7, write_page_checksum=True)
    whole, expected = path.read_bytes(), documents(str(tmp_path), None)
    foot = int.from_bytes(whole[-8:-4], "little") + 8
    said = []
    for place in range(len(whole) - foot):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        documents.cache_clear()
        try:
            assert documents(str(tmp_path), None) == expected
        except Damaged as error:
            said.append(str(error))
    assert all(line.startswith(f"{path}") for line in said)
    assert len(said) > (len(whole) - foot) / 2


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_what_datasets_saved_is_damaged_where_it_is_cut_off(tmp_path: Path, file: str) -> None:
    _datasets().Dataset.from_dict({"text": _TEXTS}).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert _refused(tmp_path / "saved").startswith(f"{tmp_path}/saved: ")


_TEBIBYTE = 2**40


def _of_nothing_but_holes(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)


def _read_bytes() -> int:
    """What this process has asked of files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_more_text_than_memory_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        _of_nothing_but_holes(tmp_path / name, _TEBIBYTE)
    before = _read_bytes()
    for size in (None, 3 * _TEBIBYTE):
        with pytest.raises(DoesNotFit, match=f"^{tmp_path}: 2.000 TiB of text or more, .* set data_size to take less"):
            documents(str(tmp_path), size)
    assert _read_bytes() - before < 2**18


def test_no_more_of_a_file_is_read_than_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    _of_nothing_but_holes(tmp_path / "b.txt", _TEBIBYTE)
    before = _read_bytes()
    found = documents(str(tmp_path), 2**20)
    assert _read_bytes() - before < 2**20 + 2**18
    assert list(map(len, found)) == [3, 2**20 - 3]


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of about a kibibyte: a document of 16 MiB, two thousand times."""
    folder, arrow = tmp_path_factory.mktemp("bomb"), pyarrow()
    text = arrow.array(["x" * 2**24]).dictionary_encode().take(arrow.array([0] * 2000))
    _parquet(
        folder / "a.parquet", {"text": text}, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False
    )
    assert (folder / "a.parquet").stat().st_size < 2000
    return folder


_READ_IN_LITTLE_MEMORY = """
import resource, sys
from membench.data.arrow import pyarrow
from membench.data.sources import documents
pyarrow()
resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**29, 3 * 2**29))
print(*map(len, documents(sys.argv[1], 2**24 + 5)))
"""


def test_a_bomb_gives_no_more_than_is_wanted_and_takes_little_memory(bomb: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", _READ_IN_LITTLE_MEMORY, str(bomb)], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == (f"{2**24} 5\n", "")


def test_a_bomb_is_stopped_where_memory_would_end(bomb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "available_bytes", lambda: 2**28)
    with pytest.raises(DoesNotFit, match=r": 144.0 MiB of text or more, .* 256.0 MiB are available"):
        documents(str(bomb), None)


def test_a_column_that_says_that_it_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parquet(tmp_path / "a.parquet", {"text": ["x" * 2**20], "more": ["y" * 2**23]}, compression="zstd")
    monkeypatch.setattr(sources, "available_bytes", lambda: 2**21 - 1)
    with pytest.raises(DoesNotFit, match=r": 1.000 MiB of text or more"):
        documents(str(tmp_path), None)
    monkeypatch.setattr(sources, "available_bytes", lambda: 2**22)
    assert [len(document) for document in documents(str(tmp_path), None)] == [2**20]


def test_pipes_and_devices_and_folders_that_are_linked_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    (folder / "endless.txt").symlink_to("/dev/zero")
    (folder / "itself").symlink_to(folder)
    assert (problem(str(folder)) or "").startswith(f"'{folder}': there is no text in that folder")
    (tmp_path / "elsewhere").write_bytes(b"abc")
    (folder / "linked.txt").symlink_to(tmp_path / "elsewhere")
    assert (problem(str(folder)), documents(str(folder), None)) == (None, [b"abc"])


def test_a_pipe_in_what_datasets_saved_is_named(tmp_path: Path) -> None:
    _datasets().Dataset.from_dict({"text": _TEXTS}).save_to_disk(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    os.mkfifo(tmp_path / "data-00000-of-00001.arrow")
    assert _refused(tmp_path) == f"{tmp_path}/data-00000-of-00001.arrow: neither a file nor a folder"


@pytest.mark.parametrize("leads_to", ["nowhere", "a.txt"])
def test_a_link_that_leads_nowhere_or_to_itself_is_named(tmp_path: Path, leads_to: str) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / leads_to)
    assert f"{tmp_path}/a.txt" in (problem(str(tmp_path)) or "")
    with pytest.raises(OSError, match=f"{tmp_path}/a.txt"):
        documents(str(tmp_path), None)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that anybody may read, as somebody whom permissions hold back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        user = os.geteuid()
        yield folder
        os.seteuid(user)
        for path in folder.iterdir():
            path.chmod(0o700)


@pytest.mark.parametrize("names", ["a.txt", "b/a.txt"])
def test_what_may_not_be_read_is_named_and_not_left_out(as_nobody: Path, names: str) -> None:
    (as_nobody / "c.txt").write_bytes(b"abc")
    path = as_nobody / names
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"abc")
    closed = as_nobody / names.partition("/")[0]
    closed.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(PermissionError, match=f"{closed}"):
        documents(str(as_nobody), None)


def test_a_folder_that_may_not_be_read_is_said_to_be(as_nobody: Path) -> None:
    (as_nobody / "closed").mkdir(mode=0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    assert problem(f"{as_nobody}/closed") == f"'{as_nobody}/closed': [Errno 13] Permission denied: '{as_nobody}/closed'"


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"abc")
    _parquet(tmp_path / "a.parquet", {"text": ["def"]}).rename(tmp_path / os.fsdecode(b"\xfe.parquet"))
    assert (problem(str(tmp_path)), documents(str(tmp_path), None)) == (None, [b"def", b"abc"])


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Cases that read a text of a tebibyte, half a Parquet file whose name is no UTF-8, and text that is none twice."""
    folder = tmp_path_factory.mktemp("bad")
    sources = ("large", "damaged", "latin")
    for name in sources:
        (folder / name).mkdir()
    (folder / "latin" / "a.txt").write_bytes(_NOT_UTF8 * 200)
    _of_nothing_but_holes(folder / "large" / "a.txt", _TEBIBYTE)
    (folder / "damaged" / os.fsdecode(b"\xff.parquet")).write_bytes(b"PAR1")
    path = folder / "bad.toml"
    path.write_text(
        '[suite]\nname = "bad"\n[matrix]\nmodel = ["no-model"]\ntechnique = ["none"]\nworkload = ["large", "damaged"]\n'
        '[[include]]\nmodel = ["words", "no-model"]\ntechnique = "none"\nworkload = "latin"\n'
        '[model.words]\nuse = "no-model"\nvocabulary_size = 1000\n'
        + "".join(f'[workload.{name}]\nuse = "read-data"\ndata = "{folder / name}"\n' for name in sources)
        + "batch_size = 2\n"
    )
    run = membench.run(membench.load_suite(path), output=folder)
    return dict(zip(("large", "damaged", "latin as words", "latin as bytes"), run.records, strict=True))


def test_a_case_whose_text_does_not_fit_is_out_of_memory_and_says_what_to_do(bad: dict[str, Record]) -> None:
    assert bad["large"].status == "out-of-memory"
    assert "1.000 TiB of text or more" in (bad["large"].message or "")


def test_a_case_whose_text_is_damaged_names_the_file(bad: dict[str, Record]) -> None:
    assert bad["damaged"].status == "failed"
    assert ".parquet: ArrowInvalid: " in (bad["damaged"].message or "")


def test_a_case_says_how_much_of_its_text_was_replaced(bad: dict[str, Record]) -> None:
    said = ("not UTF-8, and read as U+FFFD: 1,000 bytes or cut-off characters of the text",)
    assert (bad["latin as words"].status, bad["latin as words"].notes) == ("ok", said)
    assert (bad["latin as bytes"].status, bad["latin as bytes"].notes) == ("ok", ())


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
    assert _refused(saved) == f"reading {saved} needs 'datasets', {wants} 'membench[datasets]'"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert _refused(tmp_path) == f"reading {path} needs 'pyarrow', {wants} 'membench[data]'"


_NOT_UTF8 = b"caf\xe9 \xff\xfe caf\xe9 \xe2\x82 \xe2\x82\xac"
"""A Latin-1 letter, two bytes that begin nothing, the letter again, two thirds of a euro sign, and a whole one."""


def _encoded(documents: Sequence[bytes], vocabulary: int) -> list[Any]:
    model = NoModel(vocabulary_size=vocabulary)
    return tokens.encoded(documents, model, vocabulary, lambda: Words(documents))


def _no_utf8() -> Any:
    """A column of text that is none: pyarrow does not look when it is told so."""
    return pyarrow().array([_NOT_UTF8, None, b"ok"]).view("string")


def test_bytes_that_are_no_utf8_come_out_of_parquet_as_they_are(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", {"text": _no_utf8()})
    assert documents(str(tmp_path), None) == [_NOT_UTF8, b"ok"]


def test_bytes_that_are_no_utf8_come_out_of_what_datasets_saved_as_they_are(tmp_path: Path) -> None:
    _datasets().Dataset(pyarrow().table({"text": _no_utf8()})).save_to_disk(tmp_path / "saved")
    assert documents(str(tmp_path / "saved"), None) == [_NOT_UTF8, b"ok"]


def test_bytes_that_are_no_utf8_are_bytes_to_a_vocabulary_of_bytes() -> None:
    (found,) = _encoded([_NOT_UTF8], 256)
    assert bytes(found.tolist()) == _NOT_UTF8


def test_bytes_that_are_no_utf8_are_replacement_characters_to_a_vocabulary_of_words() -> None:
    (found,) = _encoded([_NOT_UTF8], 1000)
    words = ["caf", "\ufffd", " ", "\ufffd", "\ufffd", " ", "caf", "\ufffd", " ", "\ufffd", " ", "€"]
    assert len(found) == len(words)
    assert [found[place] == found[1] for place in range(len(words))] == [word == "\ufffd" for word in words]
    assert [found[place] == found[2] for place in range(len(words))] == [word == " " for word in words]


def test_what_is_replaced_is_counted_without_the_replacement_characters_that_stand_in_the_text() -> None:
    assert corpus.replaced(_NOT_UTF8) == 5
    assert corpus.replaced("€ \ufffd\ufffd".encode()) == 0
    assert corpus.replaced("\ufffd".encode() + b"\xef\xbf" + "\ufffd".encode() + b"\xbd") == 2


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

    class OfWords(RehearsalModel):
        def vocabulary(self, module: nn.Module) -> int:
            return 300

    workload = Train.model_validate({"data": str(tmp_path)})
    ids = [token for piece in quality.pieces(OfWords(), OfWords().skeleton(), workload) for token in piece.ids]
    assert {0, 4} <= set(ids) <= {0, 1, 2, 3, 4}


def test_words_beyond_the_vocabulary_are_its_last_id_and_no_other_words() -> None:
    words = [chr(0x4E00 + number).encode() for number in range(400) for _ in range(400 - number)]
    (found,) = _encoded([b".".join(words)], 300)
    assert int(found.max()) == 299
    assert (found == 0).sum() == len(words) - 1  # the full stops, and nothing else
