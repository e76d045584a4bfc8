"""Codecs: nothing is lost, their own tools read what they write, and damaged frames and bombs give nothing."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import random
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

import membench
from membench import plugins
from membench.builtin.models.no_model import NoModel
from membench.builtin.techniques.data import Stream
from membench.builtin.techniques.data_compression import Compression, Gzip, Zstd
from membench.builtin.workloads.read_data import ReadData
from membench.builtin.workloads.train import Train
from membench.data import codecs, sources
from membench.data.dataset import Dataset
from membench.data.layouts import Integers
from membench.data.shards import Shards
from membench.errors import SuiteError
from membench.plugins.storage import Codec, Damaged, Storage
from membench.records.record import Record
from membench.running.derived_metrics import resolution_bytes

_CODECS: dict[str, Callable[[], Codec]] = {
    "lzw": codecs.Lzw,
    "lzma": lambda: codecs.Lzma(6),
    "zstd": lambda: codecs.Zstd(3, None),
    "gzip": lambda: codecs.Gzip(6),
    "bz2": lambda: codecs.Bz2(9),
    "lz4": lambda: codecs.Lz4(0),
    "brotli": lambda: codecs.Brotli(5),
}
_NAMES = tuple(_CODECS)
_TECHNIQUES = {technique.__name__.lower(): technique for technique in Compression.__subclasses__()}
_GZIP = Gzip.model_validate({})


def _text(size: int, skip: int = 0) -> bytes:
    return b"".join(sources.documents("library", skip + size))[skip:]


_FRAMES = {
    "one byte": b"x",
    "zeros": bytes(300_000),
    "text": _text(300_000),
    "no pattern": random.Random(0).randbytes(300_000),
}


def _rows(tokens: int, length: int = 64) -> Any:
    """Rows of bytes of text (rows, length)."""
    import numpy

    return numpy.frombuffer(_text(tokens), numpy.uint8)[: tokens // length * length].reshape(-1, length)


def _storage(codec: Codec | None, frame_tokens: int = 2**14) -> Storage:
    return Storage(Shards(), Integers("uint8"), codec, "stream", frame_tokens)


def _context(rehearsal: bool = False) -> Any:
    return SimpleNamespace(rehearsal=rehearsal)


@pytest.mark.parametrize("raw", _FRAMES.values(), ids=_FRAMES)
@pytest.mark.parametrize("name", _NAMES)
def test_what_is_compressed_comes_back_byte_for_byte(name: str, raw: bytes) -> None:
    codec = _CODECS[name]()
    stored = codec.compress(raw)
    assert codec.decompress(stored, len(raw)) == raw
    assert stored == _CODECS[name]().compress(raw)


@pytest.mark.parametrize("name", _NAMES)
def test_several_frames_come_back_one_after_the_other_or_not_at_all(name: str) -> None:
    codec, raw = _CODECS[name](), list(_FRAMES.values())
    stored, sizes = [memoryview(codec.compress(frame)) for frame in raw], [len(frame) for frame in raw]
    assert codec.decompress_all(stored, sizes) == b"".join(raw)
    for place in range(len(raw)):
        cut = [frame[:-1] if number == place else frame for number, frame in enumerate(stored)]
        with pytest.raises(Damaged):
            codec.decompress_all(cut, sizes)
        with pytest.raises(Damaged, match=str(sizes[place] + 1)):
            codec.decompress_all(stored, [size + (number == place) for number, size in enumerate(sizes)])


@pytest.mark.parametrize("name", _NAMES)
def test_text_gets_smaller(name: str) -> None:
    raw = _FRAMES["text"]
    assert len(raw) / len(_CODECS[name]().compress(raw)) > 1.5


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        (codecs.Lzma, 0, 9), (codecs.Gzip, 1, 9), (codecs.Bz2, 1, 9), (codecs.Lz4, 0, 12), (codecs.Brotli, 0, 11),
        (lambda level: codecs.Zstd(level, None), 1, 22),
    ],
    ids=["lzma", "gzip", "bz2", "lz4", "brotli", "zstd"],
)  # fmt: skip
def test_the_highest_level_writes_less_than_the_lowest(kind: Callable[[int], Codec], low: int, high: int) -> None:
    raw = _FRAMES["text"]
    fast, hard = kind(low), kind(high)
    assert len(hard.compress(raw)) < len(fast.compress(raw))
    assert hard.decompress(hard.compress(raw), len(raw)) == raw


def test_lzw_is_what_a_plain_decoder_of_its_codes_reads() -> None:
    raw = _FRAMES["text"] + _FRAMES["no pattern"] + _FRAMES["text"]  # long enough for the table to be cleared
    stored = codecs.Lzw().compress(raw)
    assert _plainly_decoded(stored) == raw


def _plainly_decoded(stored: bytes) -> bytes:
    """LZW as compress(1) has it: codes from the lowest bit up, in groups of eight of the same width."""
    assert stored[:3] == b"\x1f\x9d\x90"
    body, table, cleared = stored[3:], [bytes([byte]) for byte in range(256)] + [b""], 0
    width, group, place, previous, decoded = 9, 0, 0, b"", []
    while place + width <= 8 * len(body):
        code = int.from_bytes(body[place // 8 : place // 8 + 3], "little") >> place % 8 & 2**width - 1
        place += width
        if code == 256:
            place = group = group + -(-(place - group) // (8 * width)) * 8 * width
            del table[257:]
            width, previous, cleared = 9, b"", cleared + 1
            continue
        entry = table[code] if code < len(table) else previous + previous[:1]
        decoded.append(entry)
        if previous and len(table) < 2**16:
            table.append(previous + entry[:1])
        previous = entry
        if len(table) == 2**width and width < 16:
            place = group = group + -(-(place - group) // (8 * width)) * 8 * width
            width += 1
    assert cleared
    return b"".join(decoded)


@pytest.mark.skipif(shutil.which("compress") is None, reason="compress(1) is not installed: apt install ncompress")
def test_lzw_is_as_small_as_what_compress_writes() -> None:
    raw = _text(2**20)
    theirs = subprocess.run(["compress", "-b", "16", "-c"], input=raw, stdout=subprocess.PIPE, check=True).stdout
    ours = codecs.Lzw().compress(raw)
    assert len(ours) == pytest.approx(len(theirs), rel=0.02)
    assert codecs.Lzw().decompress(theirs, len(raw)) == raw


_TOOLS = {
    "lzw": ["gzip", "-dc"],
    "lzma": ["xz", "-dc"],
    "zstd": ["zstd", "-dc"],
    "gzip": ["gzip", "-dc"],
    "bz2": ["bzip2", "-dc"],
    "lz4": ["lz4", "-dc"],
    "brotli": ["brotli", "-dc"],
}


@pytest.mark.parametrize(("name", "tool"), [*_TOOLS.items(), ("lzw", ["uncompress", "-c"])])
def test_shards_are_files_that_the_codecs_own_tool_reads(name: str, tool: list[str], tmp_path: Path) -> None:
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    rows = _rows(2**16)
    data = Dataset.written(rows, _storage(_CODECS[name]()), 256, tmp_path / "data")
    files = sorted(path for path in data.folder.iterdir() if path.name != "index.json")
    assert len(files) == (1 if _CODECS[name]().joins else 4)
    read = b"".join(subprocess.run([*tool, file], stdout=subprocess.PIPE, check=True).stdout for file in files)
    assert read == rows.tobytes()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_zstd_reads_shards_with_their_dictionary(tmp_path: Path) -> None:
    rows = _rows(2**19)
    data = Dataset.written(rows, _storage(codecs.Zstd(3, 4096)), 256, tmp_path / "data")
    (dictionary,) = data.folder.glob("dictionary.*")
    command = ["zstd", "-dc", "-D", str(dictionary), str(data.folder / "frames.zst")]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == rows.tobytes()


def test_python_reads_what_its_own_codecs_wrote() -> None:
    raw = _FRAMES["text"]
    assert gzip.decompress(codecs.Gzip(6).compress(raw)) == raw
    assert bz2.decompress(codecs.Bz2(9).compress(raw)) == raw
    assert lzma.decompress(codecs.Lzma(6).compress(raw)) == raw


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("kept", [0, 1, 3, 0.5, -1])
def test_a_frame_that_breaks_off_is_damaged(name: str, kept: float) -> None:
    codec, raw = _CODECS[name](), _FRAMES["text"]
    stored = codec.compress(raw)
    cut = stored[: int(kept * len(stored)) if kept == 0.5 else int(kept)]
    with pytest.raises(Damaged):
        codec.decompress(cut, len(raw))


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("after", [b"stray bytes", _FRAMES["no pattern"], None], ids=["few", "many", "a frame"])
def test_what_follows_a_frame_is_not_passed_over(name: str, after: bytes | None) -> None:
    codec, raw = _CODECS[name](), _FRAMES["text"]
    stored = codec.compress(raw)
    with pytest.raises(Damaged):
        codec.decompress(stored + (stored if after is None else after), len(raw))


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("off", [-1, 1, -299_999, 10**9])
def test_a_frame_of_another_size_than_it_is_said_to_have_is_damaged(name: str, off: int) -> None:
    codec, raw = _CODECS[name](), _FRAMES["text"]
    with pytest.raises(Damaged, match=str(len(raw) + off)):
        codec.decompress(codec.compress(raw), len(raw) + off)


@pytest.mark.parametrize("name", _NAMES)
def test_bytes_that_are_no_frame_are_said_to_be_none(name: str) -> None:
    with pytest.raises(Damaged, match=rf"not a frame of {name}|header"):
        _CODECS[name]().decompress(b"Not a frame of anything at all.", 100)


@pytest.mark.parametrize("name", _NAMES)
def test_a_flipped_bit_never_gives_a_frame_of_another_size_or_another_error(name: str) -> None:
    codec, raw = _CODECS[name](), _FRAMES["text"][:20_000]
    stored = codec.compress(raw)
    for place in range(0, 8 * len(stored), 8 * len(stored) // 150):
        flipped = bytearray(stored)
        flipped[place // 8] ^= 1 << place % 8
        try:
            found = codec.decompress(bytes(flipped), len(raw))
        except Damaged:
            continue
        assert len(found) == len(raw)  # codecs without a checksum leave the rest to that of the shards


@pytest.mark.parametrize("name", _NAMES)
def test_a_flipped_bit_among_several_frames_never_gives_others_or_another_error(name: str) -> None:
    codec, raw = _CODECS[name](), [_FRAMES["text"][skip : skip + 5000] for skip in (0, 5000, 10_000)]
    stored, sizes = [codec.compress(frame) for frame in raw], [len(frame) for frame in raw]
    for place in range(0, 8 * len(stored[1]), 8 * len(stored[1]) // 150):
        flipped = bytearray(stored[1])
        flipped[place // 8] ^= 1 << place % 8
        try:
            found = codec.decompress_all([stored[0], bytes(flipped), stored[2]], sizes)
        except Damaged:
            continue
        assert len(found) == sum(sizes)
        assert (found[:5000], found[10_000:]) == (raw[0], raw[2])


def _lz4_that_says(size: int, raw: bytes) -> bytes:
    """A frame of LZ4 whose header, checksum and all, says that it holds so many bytes."""
    stored = bytearray(codecs.Lz4(0).compress(raw))
    stored[6:14] = size.to_bytes(8, "little")
    stored[14] = xxhash.xxh32_intdigest(bytes(stored[4:14])) >> 8 & 0xFF
    return bytes(stored)


@pytest.mark.parametrize("off", [-1, 1, 100_000, 2**40])
def test_lz4_never_fills_up_a_frame_of_another_size_than_its_header_says(off: int) -> None:
    raw = _FRAMES["text"]
    assert _lz4_that_says(len(raw), raw) == codecs.Lz4(0).compress(raw)
    stored = _lz4_that_says(len(raw) + off, raw)
    for size in {len(raw), len(raw) + min(off, 100_000)}:
        with pytest.raises(Damaged):
            codecs.Lz4(0).decompress(stored, size)


def test_lz4_without_its_size_is_damaged() -> None:
    from lz4 import frame  # type: ignore[import-untyped]

    raw = _FRAMES["text"]
    with pytest.raises(Damaged, match="header does not say that it holds 300000 bytes"):
        codecs.Lz4(0).decompress(frame.compress(raw, store_size=False), len(raw))


_BOMB_BYTES, _DECLARED_BYTES = 2**26, 2**20

_DECOMPRESS_BOMBS = """
import json, resource, sys
from pathlib import Path
from membench.plugins.storage import Damaged
from tests.test_data_compression import _CODECS

def kib(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    codec = _CODECS[path.stem]()
    small, bomb = codec.compress(bytes(100_000)), path.read_bytes()
    codec.decompress_all([small, small], [100_000, 100_000])
    Path("/proc/self/clear_refs").write_text("5")
    before, space = kib("VmHWM"), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * kib("VmSize") + 2**26, space[1]))
    try:
        if sys.argv[3] == "alone":
            codec.decompress(bomb, int(sys.argv[2]))
        else:
            codec.decompress_all([small, bomb], [100_000, int(sys.argv[2])])
    except Damaged as error:
        found[path.name] = [kib("VmHWM") - before, str(error)]
    resource.setrlimit(resource.RLIMIT_AS, space)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("way", ["alone", "behind another"])
def test_a_bomb_is_stopped_at_the_size_that_was_declared(way: str, tmp_path: Path) -> None:
    zeros = bytes(_BOMB_BYTES)
    light: dict[str, Codec] = {"lzma": codecs.Lzma(0), "brotli": codecs.Brotli(1), "bz2": codecs.Bz2(1)}
    for name, make in _CODECS.items():
        (tmp_path / f"{name}.bomb").write_bytes(light.get(name, make()).compress(zeros))
    (tmp_path / "lzma.dictionary").write_bytes(_asking_for_a_dictionary_of_3_gib(codecs.Lzma(0).compress(bytes(1000))))
    (tmp_path / "zstd.unsized").write_bytes(_zstd_that_does_not_say_its_size(zeros))
    command = [sys.executable, "-c", _DECOMPRESS_BOMBS, str(tmp_path), str(_DECLARED_BYTES), way]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, tuple[int, str]] = json.loads(said)
    assert found.keys() == {path.name for path in tmp_path.iterdir()}
    for name, (grown_kib, message) in found.items():
        window_bytes = 2**24 if name.startswith("brotli") else 0  # the most that the format has
        assert grown_kib * 1024 < 8 * _DECLARED_BYTES + window_bytes < _BOMB_BYTES / 2, (name, message)


def _asking_for_a_dictionary_of_3_gib(stored: bytes) -> bytes:
    """An xz stream whose block header, checksum and all, says that it looks back 3 GiB."""
    start, size = 12, 4 * (stored[12] + 1)
    header = bytearray(stored[start : start + size - 4])
    assert header[2:4] == b"\x21\x01"  # LZMA2, with one byte of properties
    header[4] = 39
    return stored[:start] + bytes(header) + zlib.crc32(header).to_bytes(4, "little") + stored[start + size :]


def _zstd_that_does_not_say_its_size(raw: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_content_size=False).compress(raw)


def test_one_codec_serves_several_threads_at_once() -> None:
    frames = [_text(100_000, skip) for skip in range(0, 800_000, 100_000)]
    for name, make in _CODECS.items():
        codec, found = make(), dict[int, bool]()
        stored = [codec.compress(frame) for frame in frames]

        def read(number: int, codec: Codec = codec, stored: Any = stored, found: Any = found) -> None:
            found[number] = all(codec.decompress(stored[number], 100_000) == frames[number] for _ in range(2))

        threads = [threading.Thread(target=read, args=(number,)) for number in range(len(frames))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(len(frames)), True), name


def _kept(folder: Path, dictionary_bytes: int | None, rows: Any) -> tuple[int, float]:
    """Bytes of the folder, and the ratio, with frames of 2 KiB."""
    facts = Dataset.written(rows, _storage(codecs.Zstd(3, dictionary_bytes), 2048), 256, folder).facts()
    return int(facts["data_bytes"][0]), facts["compression_ratio"][0]


def test_a_dictionary_makes_small_frames_smaller_and_is_counted(tmp_path: Path) -> None:
    rows = _rows(2**22)
    without, without_ratio = _kept(tmp_path / "without", None, rows)
    with_it, with_ratio = _kept(tmp_path / "with", 2**15, rows)
    (dictionary,) = (tmp_path / "with").glob("dictionary.*")
    index = (tmp_path / "with" / "index.json").stat().st_size
    assert 2**12 < dictionary.stat().st_size <= 2**15
    frames = (tmp_path / "with" / "frames.zst").stat().st_size
    assert with_it == frames + dictionary.stat().st_size + index
    assert with_ratio == pytest.approx(rows.size / (frames + dictionary.stat().st_size))
    assert with_ratio > 1.1 * without_ratio
    assert with_it < without


def _with_dictionary(folder: Path) -> tuple[Dataset, Path]:
    data = Dataset.written(_rows(2**18), _storage(codecs.Zstd(3, 4096), 2048), 256, folder)
    (dictionary,) = folder.glob("dictionary.*")
    return data, dictionary


def test_a_flipped_bit_in_the_dictionary_is_named_with_its_file_and_no_frame_is_read(tmp_path: Path) -> None:
    data, dictionary = _with_dictionary(tmp_path / "data")
    content = bytearray(dictionary.read_bytes())
    content[len(content) // 2] ^= 4
    dictionary.write_bytes(content)
    with pytest.raises(Damaged, match=rf"^{dictionary}, offset 0: "):
        data.opened()


def test_a_dictionary_that_is_cut_or_gone_is_missed(tmp_path: Path) -> None:
    data, dictionary = _with_dictionary(tmp_path / "data")
    dictionary.write_bytes(dictionary.read_bytes()[:-1])
    with pytest.raises(Damaged, match=rf"^{dictionary}, offset 0: "):
        data.opened()
    dictionary.unlink()
    with pytest.raises(Damaged, match=r"want a dictionary, and it is not there"):
        data.opened()


def test_too_little_data_for_a_dictionary_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(plugins.Unsuitable, match=r"cannot train a dictionary of 110.0 KiB on 4.000 KiB of data"):
        Dataset.written(_rows(4096), _storage(codecs.Zstd(3, 110 * 1024)), 256, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_trains_a_dictionary_that_its_little_data_allow(tmp_path: Path) -> None:
    technique = Zstd.model_validate({"dictionary_size": "110 KiB", "frame_tokens": 2048})
    storage = technique.data_storage(_storage(None), _context(rehearsal=True))
    Dataset.written(_rows(2**17), storage, 256, tmp_path / "data").facts()


def _setting(*others: plugins.Technique, workload: plugins.Workload | None = None) -> plugins.Setting:
    reading = workload or ReadData.model_validate({})
    return plugins.Setting(NoModel.model_validate({}), reading, "cpu", others[:1], others[1:])


@pytest.mark.parametrize("name", _NAMES)
def test_a_technique_keeps_frames_of_its_size_in_its_codec(name: str) -> None:
    technique = _TECHNIQUES[name].model_validate({"frame_tokens": 4096})
    before = dataclasses.replace(_storage(None), padded=True)
    storage = technique.data_storage(before, _context())
    assert storage.codec is not None
    assert storage == dataclasses.replace(before, codec=storage.codec, frame_tokens=4096)
    assert storage.codec.name == name
    assert technique.refuse(_setting(Stream())) is None


def test_levels_reach_the_codec() -> None:
    raw = _FRAMES["text"]
    options: list[tuple[dict[str, int], Codec]] = [
        ({"preset": 0}, codecs.Lzma(0)),
        ({"level": 19}, codecs.Zstd(19, None)),
        ({"level": 1}, codecs.Gzip(1)),
        ({"level": 1}, codecs.Bz2(1)),
        ({"level": 9}, codecs.Lz4(9)),
        ({"quality": 1}, codecs.Brotli(1)),
    ]
    for given, codec in options:
        made: Any = _TECHNIQUES[codec.name].model_validate(given).data_storage(_storage(None), _context()).codec
        assert made.compress(raw) == codec.compress(raw)
        assert made.compress(raw) != _CODECS[codec.name]().compress(raw)


@pytest.mark.parametrize("name", _NAMES)
def test_a_second_codec_and_a_workload_without_data_are_refused(name: str) -> None:
    technique = _TECHNIQUES[name].model_validate({})
    for others in ((_GZIP,), (Stream(), _GZIP)):
        assert technique.refuse(_setting(*others)) == "data are compressed once, and the stack names two codecs"
    reason = technique.refuse(_setting(workload=Train.model_validate({})))
    assert reason is not None
    assert "this workload reads none" in reason


def test_a_codec_is_unsuitable_where_frames_are_pages_of_a_file_or_of_another_format() -> None:
    for storage in (
        dataclasses.replace(_storage(None), reading="mapped"),
        dataclasses.replace(_storage(None), format=SimpleNamespace()),
    ):
        with pytest.raises(plugins.Unsuitable, match="have to be decompressed"):
            _GZIP.data_storage(storage, _context())


_READ = '[workload.read]\nuse = "read-data"\ndata = "library"\n'


def _suite(path: Path, techniques: str, rest: str, workloads: str = '["read"]') -> Path:
    path.write_text(
        f'[suite]\nname = "codecs"\n[matrix]\nmodel = ["no-model"]\ntechnique = {techniques}\nworkload = {workloads}\n'
        f"{rest}\n[settings]\nwarmup_steps = 1\nmeasured_steps = 1\n"
    )
    return path


@pytest.mark.parametrize(
    ("use", "option", "message"),
    [
        ("zstd", "level = 23", "must be at most 22"),
        ("zstd", 'dictionary_size = "many"', "'many' is no size"),
        ("zstd", 'dictionary_size = "10 B"', "must be at least 1024"),
        ("lzma", "preset = -1", "must be at least 0"),
        ("gzip", "level = 0", "must be at least 1"),
        ("bz2", "level = 10", "must be at most 9"),
        ("lz4", "level = 13", "must be at most 12"),
        ("brotli", "quality = 12", "must be at most 11"),
        ("lzw", "frame_tokens = 10", "must be at least 1024"),
        ("lzw", "level = 1", "level"),
    ],
)
def test_bad_options_are_one_clear_line(use: str, option: str, message: str, suite_file: Path) -> None:
    path = _suite(suite_file, '["odd"]', f'{_READ}[technique.odd]\nuse = "{use}"\n{option}')
    with pytest.raises(SuiteError) as error:
        membench.load_suite(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_codecs_speed_is_the_median_of_what_it_was_before_and_after_the_reading(tmp_path: Path) -> None:
    data = Dataset.written(_rows(2**20), _storage(codecs.Zstd(3, None)), 256, tmp_path / "data")
    assert 0 < min(data.codec_speeds()) <= max(data.codec_speeds()) < 1e5
    assert data.timed_afresh([1e9] * 10_000)["decompress_mb_per_s"][0] == 1e9
    plain = Dataset.written(_rows(2**20), _storage(None), 256, tmp_path / "plain")
    assert plain.codec_speeds() == []
    assert "decompress_mb_per_s" not in plain.timed_afresh([])


_BLOCK_BYTES = 2**20  # of uint8


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    """Streamed and whole, with 4 MiB of text, the two windows that are decoded at once, and with four times as much."""
    folder = tmp_path_factory.mktemp("codecs")
    rest = (
        '[workload.some]\nuse = "read-data"\ndata = "library"\ndata_size = "4 MiB"\n'
        '[workload.more]\nuse = "read-data"\ndata = "library"\ndata_size = "16 MiB"\n'
        '[[exclude]]\ntechnique = ["uint8", "zstd", "stream", "uint8+stream", "gzip", "uint8+gzip"]\n'
    )
    techniques = '["zstd+stream", "uint8+zstd", "uint8+zstd+stream", "uint8+zstd+gzip"]'
    suite = membench.load_suite(_suite(folder / "suite.toml", techniques, rest, '["some", "more"]'))
    found = membench.run(suite, output=folder).records
    return {(record.case["technique"], record.case["workload"]): record for record in found}


def _peak(records: dict[tuple[str, str], Record], technique: str, workload: str) -> float:
    record = records[technique, workload]
    assert record.status == "ok", record
    peak = record.metrics["peak_live_bytes"]
    assert peak is not None
    return peak


def test_streaming_four_times_the_data_takes_no_more_memory(records: dict[tuple[str, str], Record]) -> None:
    some, more = (_peak(records, "zstd+stream", workload) for workload in ("some", "more"))
    assert more == pytest.approx(some, rel=0.05)
    assert 4 * 8 * _BLOCK_BYTES < more < 7 * 8 * _BLOCK_BYTES
    some, more = (_peak(records, "uint8+zstd+stream", workload) for workload in ("some", "more"))
    # Of an eighth of the bytes the kernel's own granularity is more than the twentieth that they may differ by.
    assert more == pytest.approx(some, rel=0.05, abs=4 * resolution_bytes())
    # Two windows of two blocks, two blocks that are being decoded, and the batch that is handed out.
    assert 4 * _BLOCK_BYTES - resolution_bytes() < more < 7 * _BLOCK_BYTES + resolution_bytes()


def test_reading_whole_takes_what_the_data_are(records: dict[tuple[str, str], Record]) -> None:
    some, more = (_peak(records, "uint8+zstd", workload) for workload in ("some", "more"))
    # Some distributions ship a library of less than 16 MiB.
    four, sixteen = (sum(map(len, sources.documents("library", mib * 2**20))) for mib in (4, 16))
    assert more - some == pytest.approx(sixteen - four, rel=0.05, abs=4 * resolution_bytes())
    assert some > 4 * 2**20


def test_a_case_shows_size_ratio_and_speeds(records: dict[tuple[str, str], Record]) -> None:
    for technique in ("uint8+zstd", "uint8+zstd+stream"):
        metrics = records[technique, "some"].metrics
        ratio, size = metrics["compression_ratio"], metrics["data_bytes"]
        assert ratio is not None
        assert size is not None
        assert size == pytest.approx(4 * 2**20 / ratio, rel=0.1)  # and the index
        assert all((metrics[f"{speed}_mb_per_s"] or 0) > 0 for speed in ("compress", "decompress", "read"))
        assert records[technique, "some"].notes == ()
        # The rows as they are made, in 32 bits, are the baseline's; their frames are packed and compressed beside them.
        peak = metrics["compress_peak_live_bytes"]
        assert peak is not None
        assert 4 * 2**20 / ratio < peak < 3 * 4 * 2**20
        assert records[technique, "some"].obtained["decompress_mb_per_s"]["source"].endswith("the default allocator")
    assert "compress_peak_live_bytes" not in records["none", "some"].metrics


def test_a_stack_of_two_codecs_is_skipped_with_the_reason(records: dict[tuple[str, str], Record]) -> None:
    record = records["uint8+zstd+gzip", "some"]
    assert record.status == "skipped"
    assert "the stack names two codecs" in str(record.message)
