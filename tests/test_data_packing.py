"""Token ids in fewer bits, in mapped and columnar files, and with padding: bytes by arithmetic, and nothing lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest

import membench
from membench import plugins
from membench.builtin.workloads.read_data import ReadData
from membench.builtin.workloads.train import Train
from membench.data import tokens
from membench.data.arrow import pyarrow
from membench.data.columnar import ArrowFormat, ParquetFormat
from membench.data.dataset import Dataset
from membench.data.index import checksum
from membench.data.layouts import Bits, Integers
from membench.data.shards import Shards
from membench.errors import SuiteError
from membench.plugins import Unsuitable, registry
from membench.plugins.storage import Damaged, Extent, Storage
from membench.records.record import Record
from membench.report import text

if TYPE_CHECKING:
    from membench.plugins.storage import Ids

_READ = ReadData.model_validate({})
_TOKENS, _LENGTH = 2**23, 256


def _ids(rows: int, length: int, vocabulary: int, seed: int = 0) -> Ids:
    """Random token ids, the first and the last of the vocabulary among them."""
    ids = numpy.random.default_rng(seed).integers(vocabulary, size=(rows, length), dtype=numpy.uint32)
    ids[0, 0], ids[-1, -1] = vocabulary - 1, 0
    return ids


@pytest.mark.parametrize(("name", "width"), [("uint8", 1), ("uint16", 2), ("uint32", 4), ("int64", 8)])
def test_an_integer_is_its_bytes_from_the_lowest_up(name: str, width: int) -> None:
    layout, rows = Integers(name), _ids(5, 7, min(2 ** (8 * width), 2**32))
    extent = Extent(5, 7, int(rows.max()) + 1)
    packed = layout.pack(rows, extent)
    assert packed == b"".join(int(number).to_bytes(width, "little") for number in rows.flat)
    assert len(packed) == 5 * layout.bytes_per_row(extent)
    assert (layout.unpack(packed, extent) == rows).all()


@pytest.mark.parametrize("bits", range(1, 25))
def test_a_bit_packed_row_is_one_number_of_so_many_bits_an_id(bits: int) -> None:
    layout, vocabulary = Bits(), 2 ** (bits - 1) + 1  # the smallest that wants so many bits
    for length in (1, 3, 8, 13, 64):
        rows, extent = _ids(4, length, vocabulary), Extent(4, length, vocabulary)
        packed = layout.pack(rows, extent)
        expected = b""
        for row in rows.tolist():
            number = sum(token << bits * place for place, token in enumerate(row))
            expected += number.to_bytes(-(-length * bits // 8), "little")
        assert packed == expected
        assert layout.bytes_per_row(extent) == -(-length * bits // 8)
        unpacked = layout.unpack(packed, extent)
        assert (unpacked == rows).all()
        assert unpacked.itemsize == (1 if bits <= 8 else 2 if bits <= 16 else 4)


def test_a_vocabulary_of_one_still_has_a_bit() -> None:
    rows, extent = numpy.zeros((2, 9), numpy.uint32), Extent(2, 9, 1)
    assert Bits().pack(rows, extent) == bytes(4)
    assert (Bits().unpack(bytes(4), extent) == rows).all()


@pytest.mark.parametrize(
    ("layout", "most"),
    [(Integers("uint8"), 2**8), (Integers("uint16"), 2**16), (Bits(), 2**24)],
    ids=["8", "16", "24"],
)
def test_ids_that_do_not_fit_are_never_cut_off(layout: Any, most: int, tmp_path: Path) -> None:
    rows = _ids(2, 4, 7)
    Dataset.written(rows, Storage(Shards(), layout), most, tmp_path / "fits")
    with pytest.raises(Unsuitable, match=f"tell {most:,} token ids apart, and the vocabulary has {most + 1:,}"):
        Dataset.written(rows, Storage(Shards(), layout), most + 1, tmp_path / "does-not")
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]


_FORMATS = {
    "shards": Storage(Shards(), Integers("uint16")),
    "mapped": Storage(Shards(), Integers("uint16"), reading="mapped"),
    "bits": Storage(Shards(), Bits()),
    "parquet": Storage(ParquetFormat("none"), Integers("uint16")),
    "parquet-snappy": Storage(ParquetFormat("snappy"), Integers("int64")),
    "parquet-zstd": Storage(ParquetFormat("zstd"), Integers("uint32"), reading="stream"),
    "arrow": Storage(ArrowFormat(), Integers("uint16"), reading="mapped"),
}
_VOCABULARY = 5000


def _written(name: str, folder: Path, rows: int = 75) -> tuple[Ids, Dataset]:
    """So many rows of 64 tokens in frames of 16 rows."""
    ids = _ids(rows, 64, _VOCABULARY)
    return ids, Dataset.written(ids, replace(_FORMATS[name], frame_tokens=1024), _VOCABULARY, folder)


@pytest.mark.parametrize("name", _FORMATS)
def test_frames_can_be_read_in_any_order_and_are_what_was_written(name: str, tmp_path: Path) -> None:
    ids, data = _written(name, tmp_path / "data")
    read = data.storage.format.open(data.extent, data.storage, data.folder)
    for first, last in ((4, 4), (0, 0), (1, 3), (2, 2), (0, 4), (3, 4)):
        assert (read(range(first, last + 1)) == ids[first * 16 : (last + 1) * 16]).all()
    assert len(read(range(4, 5))) == 75 - 4 * 16
    assert data.facts()["data_bytes"][0] == sum(path.stat().st_size for path in (tmp_path / "data").iterdir())


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_a_frame_that_was_written_wrong_is_named_by_its_own_offset(name: str, tmp_path: Path) -> None:
    """Its checksum is right: only the library can tell."""
    _, data = _written(name, tmp_path / "data")
    (path,) = data.folder.glob("rows.*")
    index = json.loads((data.folder / "index.json").read_text())
    sizes = [size for size, _ in index["frames"]]
    offset = index["head_bytes"] + sum(sizes[:2])
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(byte ^ 0xFF for byte in content[offset : offset + 40])
    path.write_bytes(content)
    index["frames"][2][1] = checksum(bytes(content[offset : offset + sizes[2]]))
    (data.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(Damaged, match=rf"^{path}, offset {offset}: "):
        data.storage.format.open(data.extent, data.storage, data.folder)(range(5))


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    _, data = _written("mapped", tmp_path / "data")
    read = data.storage.format.open(data.extent, data.storage, data.folder)
    (first, again) = read(range(1, 3)), read(range(1, 3))
    assert first.ctypes.data == again.ctypes.data


def test_parquet_is_a_column_of_lists_that_pyarrow_reads_without_a_dictionary(tmp_path: Path) -> None:
    for name, codec in (("parquet", "UNCOMPRESSED"), ("parquet-snappy", "SNAPPY"), ("parquet-zstd", "ZSTD")):
        ids, _ = _written(name, tmp_path / name)
        with pyarrow().parquet.ParquetFile(tmp_path / name / "rows.parquet") as file:
            assert file.read()["input_ids"].to_pylist() == ids.tolist()
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        assert [group.num_rows for group in groups] == [16, 16, 16, 16, 11]
        assert {group.column(0).compression for group in groups} == {codec}
        assert not any("DICTIONARY" in encoding for group in groups for encoding in group.column(0).encodings)


def test_arrow_is_a_column_of_lists_that_pyarrow_reads(tmp_path: Path) -> None:
    ids, _ = _written("arrow", tmp_path / "data")
    with pyarrow().ipc.open_file(str(tmp_path / "data" / "rows.arrow")) as file:
        assert file.num_record_batches == 5
        assert file.read_all()["input_ids"].to_pylist() == ids.tolist()


def _largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("name", _FORMATS)
def test_whatever_byte_of_a_file_changes_no_row_of_it_is_read(name: str, tmp_path: Path) -> None:
    """The library's own headers too: parsing a flipped bit in one of Arrow's can end the process."""
    _, data = _written(name, tmp_path / "data", rows=19)
    path = _largest(tmp_path / "data")
    whole = path.read_bytes()
    for place in range(0, len(whole), 1 if name == "arrow" else 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(Damaged, match=rf"^{path}, offset \d+"):
            data.facts()
    path.write_bytes(whole)
    data.facts()


@pytest.mark.parametrize("name", _FORMATS)
def test_a_file_of_another_length_or_none_is_found_before_it_is_read(name: str, tmp_path: Path) -> None:
    _, data = _written(name, tmp_path / "data", rows=19)
    path = _largest(tmp_path / "data")
    whole = path.read_bytes()
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        with pytest.raises(Damaged, match=rf"^{path}, offset \d+: .* should be here, and the file ends at {size}$"):
            data.opened()
    path.write_bytes(whole + b"\0")
    with pytest.raises(Damaged, match=rf"^{path}, offset \d+: .* and the file ends at {len(whole) + 1}$"):
        data.opened()
    path.unlink()
    with pytest.raises(Damaged, match=rf"^{path}, offset \d+: .* should be here, and the file ends at 0$"):
        data.opened()


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_rows_of_another_kind_are_not_taken_for_those_that_are_wanted(name: str, tmp_path: Path) -> None:
    _, data = _written(name, tmp_path / "data")
    other = replace(data, storage=replace(data.storage, layout=Integers("int64")))
    with pytest.raises(Damaged, match=r"what is here is .*layout uint16, .*, and .*layout int64, .* is to be read"):
        other.opened()
    path = _largest(tmp_path / "data")
    _, more = _written(name, tmp_path / "more", rows=76)
    path.write_bytes(_largest(tmp_path / "more").read_bytes())
    with pytest.raises(Damaged, match=f"^{path}, offset "):
        data.opened()
    with pytest.raises(Damaged, match=r"what is here is .*extent \(76, .*, and .*extent \(75, .* is to be read"):
        replace(more, extent=data.extent).opened()


@pytest.mark.parametrize("name", _FORMATS)
def test_writing_that_is_interrupted_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    def frames() -> Iterator[Ids]:
        yield _ids(16, 64, _VOCABULARY)
        raise KeyboardInterrupt

    storage = _FORMATS[name]
    with pytest.raises(KeyboardInterrupt):
        storage.format.write(frames(), Extent(75, 64, _VOCABULARY), storage, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def _refusal(names: tuple[str, ...], workload: plugins.Workload = _READ) -> str | None:
    """What the first member of a stack that refuses says."""
    members = [registry.create("technique", name, {}) for name in names]
    model = registry.create("model", "no-model", {})
    for place, member in enumerate(members):
        setting = plugins.Setting(model, workload, "cpu", tuple(members[:place]), tuple(members[place + 1 :]))
        if reason := member.check(setting) or member.refuse(setting):
            return str(reason)
    return None


_CLASHES = {
    ("uint8", "uint16"): "token ids are written in one way, and the stack names two",
    ("uint8", "bit-packed"): "token ids are written in one way, and the stack names two",
    ("parquet", "arrow"): "data are kept in one format, and the stack names two",
    ("zstd", "mapped-tokens"): "a mapped file is read as it lies",
    ("lzma", "parquet"): "a codec compresses membench's own shards",
    ("gzip", "arrow"): "a codec compresses membench's own shards",
    ("mapped-tokens", "parquet"): "mapped-tokens maps membench's own shards",
    ("mapped-tokens", "arrow"): "mapped-tokens maps membench's own shards",
    ("mapped-tokens", "stream"): "a mapped file has nothing to decode",
    ("arrow", "stream"): "an arrow file is mapped and has nothing to decode",
    ("bit-packed", "mapped-tokens"): "bits are unpacked in memory",
    ("bit-packed", "parquet"): "bits are unpacked in memory",
    ("bit-packed", "arrow"): "bits are unpacked in memory",
}  # fmt: skip


@pytest.mark.parametrize("pair", _CLASHES, ids="+".join)
def test_what_does_not_go_together_is_refused_in_whatever_order(pair: tuple[str, str]) -> None:
    for stack in (pair, pair[::-1], ("pad-documents", *pair)):
        assert (_refusal(stack) or "").startswith(_CLASHES[pair])


@pytest.mark.parametrize(
    "stack",
    [("uint8", "mapped-tokens"), ("mapped-tokens", "uint8"), ("uint16", "parquet", "stream"), ("arrow", "uint32"),
     ("bit-packed", "zstd", "stream"), ("pad-documents", "bit-packed"), ("stream", "parquet")],
    ids="+".join,
)  # fmt: skip
def test_what_goes_together_is_not_refused(stack: tuple[str, ...]) -> None:
    assert _refusal(stack) is None


@pytest.mark.parametrize(
    "name", ["uint8", "uint16", "uint32", "bit-packed", "mapped-tokens", "parquet", "arrow", "pad-documents"]
)
def test_a_workload_that_reads_no_data_is_no_use_to_any(name: str) -> None:
    assert "this workload reads none" in (_refusal((name,), Train.model_validate({})) or "")


def test_padding_is_not_trained_on() -> None:
    reason = _refusal(("pad-documents",), Train.model_validate({"data": "topics"}))
    assert reason == "the training loss has no mask for padding: it would be learnt; use read-data"


def _suite(path: Path, model: str, technique: str) -> Path:
    path.write_text(
        f'[suite]\nname = "s"\n[matrix]\nmodel = ["{model}"]\ntechnique = ["{technique}"]\nworkload = ["read-data"]\n'
        + "".join(f'[model.of-{size}]\nuse = "no-model"\nvocabulary_size = {size}\n' for size in (257, 65537, 2**24))
    )
    return path


@pytest.mark.parametrize(
    ("model", "technique", "bits"), [("of-257", "uint8", 8), ("of-65537", "uint16", 16), ("llama-15m", "uint8", 8)]
)
def test_a_vocabulary_that_is_known_to_be_too_large_is_refused_before_anything_runs(
    suite_file: Path, model: str, technique: str, bits: int
) -> None:
    with pytest.raises(SuiteError, match=rf"'{technique}' .*: {bits} bits tell [\d,]+ token ids apart"):
        membench.load_suite(_suite(suite_file, model, technique))


@pytest.mark.parametrize(
    ("model", "technique"), [("of-257", "uint16"), ("of-65537", "uint32"), (f"of-{2**24}", "bit-packed")]
)
def test_a_vocabulary_that_fits_is_not_refused(suite_file: Path, model: str, technique: str) -> None:
    assert membench.load_suite(_suite(suite_file, model, technique)).cases


@pytest.mark.parametrize(
    ("lengths", "count", "padding"), [([3, 10, 8], 4, 11), ([8, 16], 3, 0), ([1, 1, 1], 3, 21), ([9], 2, 7)]
)
def test_a_padded_document_begins_a_row_and_fills_its_last(lengths: list[int], count: int, padding: int) -> None:
    numbers = itertools.count(1)
    documents = [numpy.array([next(numbers) for _ in range(length)], numpy.uint32) for length in lengths]
    rows, filled = tokens.rows(documents, 8, padded=True)
    assert (rows.shape, filled) == ((count, 8), padding)
    pieces = [document[start : start + 8].tolist() for document in documents for start in range(0, len(document), 8)]
    assert rows.tolist() == [[*piece, *[0] * (8 - len(piece))] for piece in pieces]


def test_packed_documents_follow_each_other_without_padding() -> None:
    documents = [numpy.arange(start, start + 5, dtype=numpy.uint32) for start in (0, 5, 10, 15)]
    rows, filled = tokens.rows(documents, 8, padded=False)
    assert (rows.tolist(), filled) == ([list(range(8)), list(range(8, 16))], 0)


def test_a_token_id_that_is_none_of_the_vocabulary_is_refused_and_not_packed_as_another(tmp_path: Path) -> None:
    rows = numpy.array([[1, 2], [300, 4]], numpy.uint32)
    with pytest.raises(Unsuitable, match="there is token id 300, and the model's vocabulary has 256"):
        Dataset.written(rows, Storage(Shards(), Integers("uint8")), 256, tmp_path / "data")


_STACKS = (
    "none", "uint8", "uint16", "uint32", "bit-packed", "uint8+mapped-tokens", "uint32+parquet", "uint8+arrow",
    "pad-documents",
)  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Record]:
    """One document of 4 Mi random bytes, of which 64 kinds are told apart, and one of a single byte."""
    folder = tmp_path_factory.mktemp("packing")
    data = folder / "text"
    data.mkdir()
    noise = numpy.random.default_rng(0).integers(64, size=_TOKENS - 1, dtype=numpy.uint8).tobytes()
    (data / "a.txt").write_bytes(noise)
    (data / "b.txt").write_bytes(b"!")
    path = folder / "packing.toml"
    path.write_text(
        '[suite]\nname = "packing"\n[matrix]\nmodel = ["kinds"]\n'
        f'technique = {list(_STACKS)}\nworkload = ["read"]\n[model.kinds]\nuse = "no-model"\nvocabulary_size = 64\n'
        f'[workload.read]\nuse = "read-data"\ndata = "{data}"\nsequence_length = {_LENGTH}\n'
        "[settings]\nmeasured_steps = 1\nthreads = 1\n"
    )
    run = membench.run(membench.load_suite(path), output=folder)
    return {record.technique: record for record in run.records}


@pytest.mark.parametrize(
    ("technique", "bits"),
    [("none", 64), ("uint8", 8), ("uint16", 16), ("uint32", 32), ("bit-packed", 6), ("uint8+mapped-tokens", 8),
     ("uint8+arrow", 8), ("uint32+parquet", 32)],
)  # fmt: skip
def test_data_take_their_bits_on_disk(records: Mapping[str, Record], technique: str, bits: int) -> None:
    metrics = records[technique].metrics
    if technique == "uint32+parquet":  # snappy finds nothing in noise but that three bytes of four are zero
        assert _TOKENS < (metrics["data_bytes"] or 0) < 2.2 * _TOKENS
    else:
        assert metrics["data_bytes"] == pytest.approx(_TOKENS * bits / 8, rel=0.003)


@pytest.mark.parametrize(
    ("technique", "bits"),
    [("none", 64), ("uint8", 8), ("uint16", 16), ("uint32", 32), ("bit-packed", 8), ("uint32+parquet", 32)],
)
def test_what_is_read_whole_is_held_as_integers(records: Mapping[str, Record], technique: str, bits: int) -> None:
    held = records[technique].metrics["held_live_bytes"]
    assert held == pytest.approx(_TOKENS * bits / 8, abs=2 * 2**20)


@pytest.mark.parametrize("technique", ["uint8+mapped-tokens", "uint8+arrow"])
def test_a_mapped_file_is_no_live_memory(records: Mapping[str, Record], technique: str) -> None:
    metrics = records[technique].metrics
    assert (metrics["held_live_bytes"] or 0) < 2**20
    # A window of two blocks of 2²⁰ tokens, and what a batch is made of.
    assert (metrics["peak_live_bytes"] or 0) < 2 * 2**20 + 2 * 2**20
    assert (metrics["peak_footprint_bytes"] or 0) > _TOKENS


def test_every_stack_reads_the_same_number_of_tokens_and_padding_is_none(records: Mapping[str, Record]) -> None:
    for record in records.values():
        assert record.status == "ok", record.message
        read = (record.metrics["tokens_per_s"] or 0) * (record.metrics["step_median_s"] or 0)
        assert read == pytest.approx(_TOKENS, abs=0.5)


def test_the_share_of_padding_is_shown(records: Mapping[str, Record]) -> None:
    assert records["none"].metrics["padding_percent"] == 0
    # The long document lacks one token of whole rows, and the short one has one of its row.
    assert records["pad-documents"].metrics["padding_percent"] == pytest.approx(100 * 256 / (_TOKENS + 256))
    assert "padding" in text.comparison([records["none"], records["pad-documents"]])
    assert "padding" not in text.comparison([records["none"], records["uint8"]])
