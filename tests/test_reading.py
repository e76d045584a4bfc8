"""Reading training data: the same batches however they are kept, each row once an epoch, and the same training."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest

import membench
from membench.data import corpus
from membench.data.columnar import ArrowFormat, ParquetFormat
from membench.data.dataset import Dataset
from membench.data.epochs import endless, epochs
from membench.data.layouts import Bits, Integers
from membench.data.shards import Shards
from membench.errors import SuiteError
from membench.plugins import Unsuitable, storage
from membench.plugins.storage import Damaged, Extent, Read, Storage
from membench.protocol.case import Plugin
from membench.protocol.requests import MeasureCase, Rank, ReferenceLogits, Steps
from membench.records.record import Record
from membench.worker.assembly import Assembly

if TYPE_CHECKING:
    from membench.plugins.storage import Ids

_ROWS, _LENGTH, _BATCH = 700, 64, 32

_PLAIN = Storage(Shards(), Integers("int64"))
_STORAGES = {
    "uint8": replace(_PLAIN, layout=Integers("uint8")),
    "uint16 in small frames": replace(_PLAIN, layout=Integers("uint16"), frame_tokens=200),
    "mapped": replace(_PLAIN, layout=Integers("uint8"), reading="mapped"),
    "mapped in small frames": replace(_PLAIN, reading="mapped", frame_tokens=1024),
    "streamed": replace(_PLAIN, layout=Integers("uint32"), reading="stream", frame_tokens=500),
    "bits": Storage(Shards(), Bits()),
    "bits, streamed": Storage(Shards(), Bits(), reading="stream"),
    "parquet": Storage(ParquetFormat("snappy"), Integers("uint16")),
    "parquet, streamed": Storage(ParquetFormat("zstd"), Integers("uint16"), reading="stream", frame_tokens=2048),
    "arrow": Storage(ArrowFormat(), Integers("uint8"), reading="mapped", frame_tokens=1024),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 rows, so that a small corpus has several windows of two."""
    monkeypatch.setattr(storage, "BLOCK_TOKENS", 64 * _LENGTH)


def _ids(rows: int = _ROWS, length: int = _LENGTH) -> Ids:
    """Random token ids, but the first two of a row say which row it is."""
    ids = numpy.random.default_rng(0).integers(250, size=(rows, length), dtype=numpy.uint32)
    ids[:, 0], ids[:, 1] = numpy.divmod(numpy.arange(rows), 250)
    return ids


def _which(batches: list[Any]) -> list[int]:
    """The rows that are in the batches, by number."""
    return [250 * int(row[0]) + int(row[1]) for batch in batches for row in batch]


def _written(folder: Path, storage: Storage = _PLAIN, rows: int = _ROWS) -> Dataset:
    return Dataset.written(_ids(rows), storage, 250, folder)


@pytest.mark.parametrize("name", _STORAGES)
def test_batches_have_the_same_ids_however_they_are_kept_each_as_wide_as_it_is_kept(name: str, tmp_path: Path) -> None:
    read = epochs(_written(tmp_path / "plain"), _BATCH, 3, 0)
    data = _written(tmp_path / "other", _STORAGES[name])
    others = epochs(data, _BATCH, 3, 0)
    kept = data.storage.layout.type(data.extent)
    for epoch in range(2):
        expected, found = [batch.numpy() for batch in read(epoch)], [batch.numpy() for batch in others(epoch)]
        assert {batch.dtype for batch in found} == {kept}
        assert [batch.astype(numpy.int64).tobytes() for batch in found] == [batch.tobytes() for batch in expected]


def test_an_epoch_has_each_row_once_and_in_another_order_than_the_last(tmp_path: Path) -> None:
    read = epochs(_written(tmp_path / "data"), _BATCH, 3, 0)
    first, second = list(read(0)), list(read(1))
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [_BATCH] * (_ROWS // _BATCH) + [_ROWS % _BATCH]
        assert sorted(_which(batches)) == list(range(_ROWS))
        assert (numpy.concatenate(batches) == _ids()[_which(batches)]).all()
    assert _which(first) != _which(second)
    assert _which(list(read(0))) == _which(first)


class _Panic(BaseException):
    """What is none of the errors that are expected."""


class _Watched:
    """Shards, with a look at the rows of frames before they are given."""

    def __init__(self, look: Callable[[Ids], Ids]) -> None:
        self._look = look

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        Shards().write(frames, extent, storage, folder)

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Read:
        read = Shards().open(extent, storage, folder)
        return lambda numbers: self._look(read(numbers))


def _watched(folder: Path, look: Callable[[Ids], Ids]) -> Dataset:
    return _written(folder, Storage(_Watched(look), Integers("uint8"), reading="stream", frame_tokens=16 * _LENGTH))


@pytest.mark.parametrize("error", [Damaged, _Panic], ids=["damaged", "panic"])
@pytest.mark.parametrize("on_helper", [True, False], ids=["the thread that helps", "the thread that reads"])
def test_what_befalls_either_thread_is_heard_by_who_reads(
    on_helper: bool, error: type[BaseException], tmp_path: Path
) -> None:
    def look(rows: Ids) -> Ids:
        time.sleep(0.01)  # so that the other one comes by
        if (threading.current_thread() is threading.main_thread()) != on_helper:
            raise error("bad")
        return rows

    data = _watched(tmp_path / "data", look)
    with pytest.raises(error, match="bad"):
        list(epochs(data, _BATCH, 3, 0)(0))
    assert _helpers_end()


def _helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading ahead")]


def _helpers_end() -> bool:
    """Whether none is left, a little after it is no longer wanted."""
    deadline = time.monotonic() + 10
    while _helpers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _helpers()


def test_reading_that_is_given_up_leaves_no_thread(tmp_path: Path) -> None:
    for count in range(1, 6):
        batches = epochs(_watched(tmp_path / str(count), lambda rows: rows), _BATCH, 3, 0)(0)
        for _ in range(count):
            next(batches)
        batches.close()  # type: ignore[attr-defined]
        del batches
        assert _helpers_end()


def test_what_is_given_up_may_be_collected_by_the_thread_that_helps(tmp_path: Path) -> None:
    collects, collected = threading.Event(), threading.Event()

    def look(rows: Ids) -> Ids:
        if collects.is_set() and threading.current_thread() is not threading.main_thread():
            gc.collect()
            collected.set()
        return rows

    given_up: dict[str, Any] = {}
    given_up["itself"] = given_up
    gc.disable()
    try:
        read = epochs(_watched(tmp_path / "data", look), _BATCH, 3, 0)
        given_up["batches"] = read(0)
        next(given_up["batches"])
        del given_up
        collects.set()
        assert len(list(read(1))) == -(-_ROWS // _BATCH)
        assert collected.wait(10)
        collects.clear()
        assert len(list(read(2))) == -(-_ROWS // _BATCH)
    finally:
        gc.enable()


@pytest.mark.parametrize("suspended", [False, True])
def test_a_forked_process_reads_on_without_the_thread_that_helped(suspended: bool, tmp_path: Path) -> None:
    read = epochs(_watched(tmp_path / "data", lambda rows: rows), _BATCH, 3, 0)
    batches = list(read(0))
    given_up = read(1)
    if suspended:
        next(given_up)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        del given_up
        os._exit(0 if len(list(read(2))) == len(batches) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_damage_that_was_told_keeps_neither_file_nor_thread(tmp_path: Path) -> None:
    data = _written(tmp_path / "data", Storage(Shards(), Integers("uint8"), reading="stream"))
    path = data.folder / "frames.bin"
    path.write_bytes(bytes(path.stat().st_size))
    assert _helpers_end()
    files = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        for _ in range(20):
            with contextlib.suppress(Damaged):
                list(epochs(data, _BATCH, 3, 0)(0))
        assert _helpers_end()
        assert len(os.listdir("/proc/self/fd")) == files
    finally:
        gc.enable()


def test_data_of_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match="no rows"):
        _written(tmp_path / "data", rows=0)


def test_one_thread_helps_from_epoch_to_epoch(tmp_path: Path) -> None:
    helpers = set[int]()

    def look(rows: Ids) -> Ids:
        time.sleep(0.002)  # so that the other one comes by
        helpers.add(threading.get_ident())
        return rows

    assert _helpers_end()
    read = epochs(_watched(tmp_path / "data", look), _BATCH, 3, 0)
    for epoch in range(5):
        assert len(list(read(epoch))) == -(-_ROWS // _BATCH)
        assert len(_helpers()) == 1
    assert len(helpers - {threading.get_ident()}) == 1
    del read
    assert _helpers_end()


def test_frames_are_taken_as_they_were_kept_or_not_at_all(tmp_path: Path) -> None:
    kept = _written(tmp_path / "kept", _STORAGES["uint8"])
    columns = _watched(tmp_path / "columns", numpy.asfortranarray)
    for expected, found in zip(epochs(kept, _BATCH, 3, 0)(0), epochs(columns, _BATCH, 3, 0)(0), strict=True):
        assert (expected == found).all()
    narrower = _watched(tmp_path / "narrower", lambda rows: rows[:, :-1])
    fewer = _watched(tmp_path / "fewer", lambda rows: rows[:1])
    for data in (narrower, fewer):
        with pytest.raises(ValueError, match=r"frames \d+ to \d+ were read as \(\d+, \d+\) rows and tokens, and "):
            list(epochs(data, _BATCH, 3, 0)(0))


def test_rows_of_a_batch_come_from_several_places(tmp_path: Path) -> None:
    for batch in list(epochs(_written(tmp_path / "data"), _BATCH, 0, 0)(0))[:-4]:
        assert len({row // 64 for row in _which([batch])}) >= 2


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    data = _written(tmp_path / "data")
    assert _which(list(epochs(data, _BATCH, 0, 0)(0))) != _which(list(epochs(data, _BATCH, 1, 0)(0)))


def test_readers_share_the_rows_out_among_them(tmp_path: Path) -> None:
    data = _written(tmp_path / "data")
    shares = [_which(list(data.batches(_BATCH, 0, 0, data.opened(), (number, 2)))) for number in range(2)]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == list(range(_ROWS))


def test_training_takes_full_batches_of_one_epoch_after_the_other(tmp_path: Path) -> None:
    data = _written(tmp_path / "data")
    batches, read = endless(data, _BATCH, 3, 0), epochs(data, _BATCH, 3, 0)
    for epoch in range(2):
        for expected in list(read(epoch))[:-1]:
            assert (next(batches) == expected).all()


_TWO_WORKERS = """
import json, sys
from pathlib import Path
from membench.plugins import storage
from membench.data.epochs import endless, epochs
from membench.plugins.storage import Damaged
from membench.plugins import Unsuitable
from tests.test_reading import _written, _which
storage.BLOCK_TOKENS = 64 * 64
data = _written(Path(sys.argv[1]) / "data")
read = epochs(data, 32, 3, 2)
found = [_which(list(read(epoch))) for epoch in range(2)]
try:
    next(endless(_written(Path(sys.argv[1]) / "few", rows=300), 299, 3, 2))
except Unsuitable as error:
    too_few = str(error)
path = Path(sys.argv[1]) / "data" / "frames.bin"
path.write_bytes(path.read_bytes()[:-1] + b"!")
try:
    list(read(2))
except Damaged as error:
    print(json.dumps([found, too_few, str(error)]))
"""


def test_two_processes_read_each_row_once_an_epoch_and_what_they_find_wrong_is_said(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _TWO_WORKERS, str(tmp_path)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (first, second), too_few, damaged = json.loads(ran.stdout)
    assert sorted(first) == sorted(second) == list(range(_ROWS))
    assert first != second
    # 300 rows are two windows: neither process has as many as the batch wants.
    assert too_few == "300 rows, shared out among 2 processes, give none the 299 of a batch"
    assert damaged == f"{tmp_path}/data/frames.bin, offset 327680: the frame's checksum is not what the index says"


def _without_parts(name: str) -> contextlib.AbstractContextManager[None]:
    del name
    return contextlib.nullcontext()


def _tokens(workload: Mapping[str, Any], scratch: Path, techniques: tuple[str, ...] = ("none",)) -> list[int]:
    """The first thousand that a training gets."""
    asked = MeasureCase(
        Plugin("untrained-tiny"), [Plugin(name) for name in techniques], techniques, Plugin("train", workload),
        seed=0, steps=Steps(1, 1), reference=ReferenceLogits("", is_written_here=False),
    )  # fmt: skip
    assembly = Assembly.of(asked, Rank("cpu", 1), scratch, _without_parts, contextlib.nullcontext)
    module = assembly.model.skeleton()
    tokens = assembly.store(module).tokens(module)
    ids = [tokens(256) for _ in range(4)]
    assert {str(some.dtype) for some in ids} == {"torch.int64"}  # what an embedding and a loss take
    return [token for some in ids for token in some.tolist()]


def test_without_data_training_goes_through_the_text_from_its_start(tmp_path: Path) -> None:
    assert bytes(_tokens({}, tmp_path)) == corpus.split()[0][:1024]
    assert list(tmp_path.iterdir()) == []


def test_with_data_training_gets_rows_of_the_text(tmp_path: Path) -> None:
    found = bytes(_tokens({"data": "topics"}, tmp_path))
    text = corpus.split()[0] + b"\n\n"
    assert all(found[start : start + 128] in text for start in range(0, 1024, 128))
    assert found[:1024] != text[:1024]


@pytest.mark.parametrize("stack", ["uint8", "uint16+mapped-tokens", "bit-packed", "uint8+zstd+stream", "arrow"])
def test_training_gets_the_same_ids_however_data_are_kept(stack: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    plain = _tokens({"data": "topics"}, tmp_path / "plain")
    assert _tokens({"data": "topics"}, tmp_path / "other", tuple(stack.split("+"))) == plain


def test_too_little_text_for_a_batch_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match=r"^the data give 1 rows of 1024 tokens, and a batch needs 2$"):
        _tokens({"data": "topics", "data_size": 2000, "sequence_length": 1024}, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('use = "train"\nworkers = 2', "workload.w: workers has no meaning without data"),
        ('use = "train"\ndata_size = "1 MiB"', "workload.w: data_size has no meaning without data"),
        ('use = "read-data"\ndata = "/nowhere/at/all"', "data = '/nowhere/at/all' is neither topics nor library"),
        ('use = "read-data"\ndata = ""', "data = '' is neither topics nor library, nor a folder here"),
        ('use = "read-data"\ndata_size = "a lot"', "option 'data_size' = 'a lot'"),
        ('use = "read-data"\ndata_size = "1 Kb"', "option 'data_size' = '1 Kb'"),
        ('use = "read-data"\ndata_size = 1023', "option 'data_size' = 1023: must be at least 1024"),
        ('use = "read-data"\nworkers = -1', "option 'workers' = -1: must be at least 0"),
    ],
)  # fmt: skip
def test_bad_options_give_one_line(suite_file: Path, options: str, message: str) -> None:
    suite_file.write_text(
        '[suite]\nname = "s"\n[matrix]\nmodel = ["untrained-tiny"]\ntechnique = ["none"]\nworkload = ["w"]\n'
        f"[workload.w]\n{options}\n"
    )
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(suite_file)
    assert message in str(caught.value)


_CORPUS_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Record]:
    """Trainings from text that is kept in four ways, and epochs read by two processes; by technique and workload."""
    folder = tmp_path_factory.mktemp("reading")
    text = folder / "text"
    text.mkdir()
    (text / "noise.txt").write_bytes(numpy.random.default_rng(0).bytes(_CORPUS_BYTES + 100))
    path = folder / "reading.toml"
    path.write_text(
        '[suite]\nname = "reading"\n[matrix]\nmodel = ["untrained-tiny"]\n'
        'technique = ["none", "uint8", "uint8+mapped-tokens", "uint8+zstd+stream"]\nworkload = ["train-data"]\n'
        '[[include]]\nmodel = "untrained-tiny"\ntechnique = "none"\nworkload = "train"\n'
        '[[include]]\nmodel = "no-model"\ntechnique = ["uint8", "uint8+mapped-tokens"]\nworkload = "read"\n'
        '[workload.train-data]\nuse = "train"\ndata = "topics"\nlearning_rate = 0.01\n'
        f'[workload.read]\nuse = "read-data"\ndata = "{text}"\nworkers = 2\nbatch_size = 300\n'
        '[[exclude]]\ntechnique = ["stream", "zstd", "mapped-tokens"]\n'
        "[settings]\nmeasured_steps = 2\nthreads = 1\nevaluate_s = 0\n"
    )
    run = membench.run(membench.load_suite(path), output=folder)
    return {f"{record.technique}/{record.case['workload']}": record for record in run.records}


def test_a_training_from_packed_or_compressed_data_has_the_same_losses(records: Mapping[str, Record]) -> None:
    losses = {name: record.processes[0].losses_nats or () for name, record in records.items() if "train" in name}
    expected = losses["none/train-data"]
    # One step to warm up, five for memory, one for the breakdown, one more to warm up, two for times.
    assert len(expected) == 10
    assert (expected[-1] or math.inf) < (expected[0] or 0)
    for technique in ("uint8", "uint8+mapped-tokens", "uint8+zstd", "uint8+zstd+stream"):
        assert losses[f"{technique}/train-data"] == expected
    assert losses["none/train"] != expected


def test_data_that_are_trained_from_are_counted(records: Mapping[str, Record]) -> None:
    sizes = {name: records[f"{name}/train-data"].metrics["data_bytes"] for name in ("none", "uint8")}
    tokens = len(corpus.split()[0] + b"\n\n")
    assert sizes["uint8"] == pytest.approx(tokens, rel=0.003)
    assert sizes["none"] == pytest.approx(8 * tokens, rel=0.003)
    assert {"store_peak_live_bytes", "store_s"} <= set(records["uint8/train-data"].metrics)


def test_a_training_without_data_has_no_figures_of_any(records: Mapping[str, Record]) -> None:
    record = records["none/train"]
    assert not {"data_bytes", "store_s", "store_peak_live_bytes", "padding_percent"} & set(record.metrics)
    assert "store" not in [phase.name for phase in record.processes[0].phases]


def test_processes_that_read_are_counted(records: Mapping[str, Record]) -> None:
    whole = records["uint8/read"].metrics["children_peak_bytes"] or 0
    mapped = records["uint8+mapped-tokens/read"].metrics["children_peak_bytes"] or 0
    # Each of the two keeps all of the text; or together they map it, each the pages that it reads, beside a window.
    assert whole > 2 * _CORPUS_BYTES * 0.9
    assert whole - mapped > _CORPUS_BYTES / 4


def test_an_epoch_counts_what_is_really_read(records: Mapping[str, Record]) -> None:
    metrics = records["uint8/read"].metrics
    # Rows of 256 tokens do not fill batches of 300; all are read. The last 100 bytes of text fill no row.
    assert (metrics["tokens_per_s"] or 0) * (metrics["step_median_s"] or 0) == pytest.approx(_CORPUS_BYTES)
    assert (metrics["read_mb_per_s"] or 0) * (metrics["step_median_s"] or 0) == pytest.approx(_CORPUS_BYTES / 1e6)
