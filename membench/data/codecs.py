"""Codecs of frames: each writes its own command-line tool's format, and reads no more than a frame is said to hold.

A frame is whole only if it ends where its bytes end and holds what it is said to. What a damaged one still makes is
never given: ``decompress`` raises ``Damaged``. ``decompress_all`` may pass over what follows a frame within its bytes,
where the library does.
"""

from __future__ import annotations

import functools
import io
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.data.arrow import pyarrow
from membench.plugins import Unsuitable
from membench.plugins.storage import Buffer, Damaged
from membench.units import format_bytes

if TYPE_CHECKING:
    import zstandard

_LZW_HEADER = b"\x1f\x9d\x90"
"""The two bytes that every file of compress(1) begins with, then: codes of up to 16 bits, table cleared when full."""

_LZMA_DICTIONARY_BYTES = tuple(2**power for power in (18, 20, 21, 22, 22, 23, 23, 24, 25, 26))
"""Of xz's presets 0 to 9, as xz(1) has them."""

_SAMPLE_BYTES = 4096
_SAMPLES_TO_DICTIONARY = 100
"""How many times its own size a dictionary is trained on, as zstd(1) advises."""

_LZ4_HEADER = struct.Struct("<4sBBQ")
"""What a frame begins with: its mark, flags, the size of blocks and, if the flag for it is set, that of the whole."""
_LZ4_MARK, _LZ4_HAS_SIZE = b"\x04\x22\x4d\x18", 0x08

_BROTLI_STEP_BYTES = 2**16


class _Codec:
    """A codec that learns nothing from the data, and whose tool reads frames one after the other as one file."""

    name: str
    ending: str
    joins: bool = True

    def learn(self, frames: Iterable[bytes], folder: Path) -> None:
        pass

    def remember(self, folder: Path) -> None:
        pass

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        raise NotImplementedError

    def decompress_all(self, stored: Sequence[Buffer], raw_bytes: Sequence[int]) -> bytes:
        return b"".join(map(self.decompress, stored, raw_bytes))


class _Streamed(_Codec):
    """A codec whose library decompresses as Python's own do: so many bytes at most, and says where a stream ends."""

    def decompressor(self, raw_bytes: int) -> tuple[Any, tuple[type[Exception], ...]]:
        """For one frame; and what it raises on bytes that are none."""
        raise NotImplementedError

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        stream, errors = self.decompressor(raw_bytes)
        try:
            # One byte more than there should be: it shows that there are more, and lets a whole frame come to its end.
            raw: bytes = stream.decompress(stored, raw_bytes + 1)
        except errors as error:
            raise _no_frame(self.name, error) from None
        if not stream.eof and len(raw) <= raw_bytes:
            raise _broken_off(len(raw), raw_bytes)
        return _whole(raw, raw_bytes, len(stream.unused_data or b""))


class Gzip(_Streamed):
    """DEFLATE in the format of gzip(1)."""

    name, ending = "gzip", "gz"
    _WINDOW_BITS = 31  # the largest window, and gzip's header and checksum

    def __init__(self, level: int) -> None:
        self._level = level

    def compress(self, raw: bytes) -> bytes:
        stream = zlib.compressobj(self._level, zlib.DEFLATED, self._WINDOW_BITS)
        return stream.compress(raw) + stream.flush()

    def decompressor(self, raw_bytes: int) -> tuple[Any, tuple[type[Exception], ...]]:
        return zlib.decompressobj(self._WINDOW_BITS), (zlib.error,)


class Bz2(_Streamed):
    """Burrows-Wheeler blocks in the format of bzip2(1)."""

    name, ending = "bz2", "bz2"

    def __init__(self, level: int) -> None:
        self._level = level

    def compress(self, raw: bytes) -> bytes:
        import bz2

        return bz2.compress(raw, self._level)

    def decompressor(self, raw_bytes: int) -> tuple[Any, tuple[type[Exception], ...]]:
        import bz2

        return bz2.BZ2Decompressor(), (OSError, ValueError)


class Lzma(_Streamed):
    """LZMA2 in the format of xz(1)."""

    name, ending = "lzma", "xz"

    def __init__(self, preset: int) -> None:
        self._preset = preset

    def compress(self, raw: bytes) -> bytes:
        import lzma

        # A dictionary larger than the frame finds nothing more, and takes ten times its size.
        dictionary = min(_LZMA_DICTIONARY_BYTES[self._preset], max(4096, len(raw)))
        return lzma.compress(raw, filters=[{"id": lzma.FILTER_LZMA2, "preset": self._preset, "dict_size": dictionary}])

    def decompressor(self, raw_bytes: int) -> tuple[Any, tuple[type[Exception], ...]]:
        import lzma

        # A header may ask for a dictionary of 4 GiB; one rounded up from the frame's size is all that we write.
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * raw_bytes + 2**20), (lzma.LZMAError,)


class Lz4(_Codec):
    """LZ4 in the frame format of lz4(1), with the size of what is inside."""

    name, ending = "lz4", "lz4"

    def __init__(self, level: int) -> None:
        self._level = level

    def compress(self, raw: bytes) -> bytes:
        from lz4 import frame  # type: ignore[import-untyped]

        # A block that has not its full size is decoded aside and copied: of large ones many a frame has but that.
        return bytes(frame.compress(raw, self._level, frame.BLOCKSIZE_MAX256KB, block_linked=False, store_size=True))

    @functools.cached_property
    def _decoder(self) -> Any:
        """pyarrow's: that of the package copies what it has made, and keeps Python's lock while it does."""
        return pyarrow().Codec(self.name)

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        # The decoder makes what it is asked for: what is not in the frame is left as it was in memory.
        if len(stored) < _LZ4_HEADER.size:
            raise _no_frame(self.name, "it ends within its header")
        mark, flags, _, content_bytes = _LZ4_HEADER.unpack_from(stored)
        if mark != _LZ4_MARK:
            raise _no_frame(self.name, "it does not begin as one does")
        if not flags & _LZ4_HAS_SIZE or content_bytes != raw_bytes:
            raise _other_size(raw_bytes)
        try:
            return bytes(self._decoder.decompress(stored, raw_bytes, asbytes=True))
        except OSError as error:
            raise _no_frame(self.name, error) from None


class Lzw(_Codec):
    """LZW in the format of compress(1), with codes of 9 to 16 bits.

    The format has neither length nor checksum: up to two stray bytes at a frame's end, less than a code, go unnoticed
    here, and are told by the checksum of the shards.
    """

    name, ending, joins = "lzw", "Z", False

    def compress(self, raw: bytes) -> bytes:
        import ncompress  # type: ignore[import-untyped]

        return bytes(ncompress.compress(raw))

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        import ncompress

        if stored[: len(_LZW_HEADER)] != _LZW_HEADER:
            raise Damaged("not a frame of lzw: it does not begin as compress(1) does with codes of 16 bits")
        made = _Bounded(stored, raw_bytes)
        try:
            ncompress.decompress(made, made)
        except ValueError as error:
            raise _no_frame(self.name, error) from None
        return _whole(bytes(made.raw), raw_bytes)


class _Bounded:
    """A file to read a frame from and to write what is in it to: it ends when more has come out than should.

    It never raises: the library writes the last of its buffer while it leaves with an error, and would end the process.
    """

    def __init__(self, stored: Buffer, most_bytes: int) -> None:
        self.raw = bytearray()
        self._stored, self._most_bytes = io.BytesIO(stored), most_bytes

    def read(self, size: int) -> bytes:
        return b"" if len(self.raw) > self._most_bytes else self._stored.read(size)

    def write(self, piece: bytes) -> None:
        if len(self.raw) <= self._most_bytes:
            self.raw += piece


class Brotli(_Codec):
    """Brotli, a stream a file, as brotli(1) reads it.

    What a stream looks back on is up to 16 MiB, whatever is in it; its decoder keeps so much beside what it gives.
    """

    name, ending, joins = "brotli", "br", False

    def __init__(self, quality: int) -> None:
        self._quality = quality

    def compress(self, raw: bytes) -> bytes:
        import brotli  # type: ignore[import-untyped]

        window_bits = min(24, max(10, len(raw).bit_length()))  # the smallest that reaches over the frame
        return bytes(brotli.compress(raw, quality=self._quality, lgwin=window_bits))

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        import brotli

        stream, pieces, made, left = brotli.Decompressor(), [], 0, bytes(stored)
        try:
            while made <= raw_bytes and not stream.is_finished():
                # The limit is passed by up to a block of the decoder's, which grow: small steps keep them small.
                piece = stream.process(left, output_buffer_limit=_BROTLI_STEP_BYTES)
                if not piece and not stream.is_finished():
                    raise _broken_off(made, raw_bytes)
                pieces.append(piece)
                made, left = made + len(piece), b""
        except brotli.error as error:
            raise _no_frame(self.name, error) from None
        return _whole(b"".join(pieces), raw_bytes)


class Zstd(_Codec):
    """Zstandard in the format of zstd(1), with the size of what is inside; if wanted, with a dictionary.

    The dictionary is a file of its own beside the frames, for ``zstd -D``; its name ends in its checksum.
    """

    name, ending = "zstd", "zst"

    def __init__(self, level: int, dictionary_bytes: int | None) -> None:
        self._level, self._dictionary_bytes = level, dictionary_bytes
        self._take(None)

    def _take(self, dictionary: zstandard.ZstdCompressionDict | None) -> None:
        self._dictionary = dictionary
        self._of_thread = threading.local()  # its contexts serve one thread at a time

    def learn(self, frames: Iterable[bytes], folder: Path) -> None:
        if self._dictionary_bytes is None:
            return
        import zstandard

        samples = _samples(frames, _SAMPLES_TO_DICTIONARY * self._dictionary_bytes)
        try:
            dictionary = zstandard.train_dictionary(self._dictionary_bytes, samples, level=self._level)
        except zstandard.ZstdError as error:
            raise Unsuitable(
                f"zstd cannot train a dictionary of {format_bytes(self._dictionary_bytes)} on "
                f"{format_bytes(sum(map(len, samples)))} of data: {error}"
            ) from None
        content = dictionary.as_bytes()
        (folder / f"dictionary.{zlib.crc32(content):08x}").write_bytes(content)
        dictionary.precompute_compress(level=self._level)
        self._take(dictionary)

    def remember(self, folder: Path) -> None:
        if self._dictionary_bytes is None:
            self._take(None)  # what compressing needs, a mebibyte or more, is not kept for reading
            return
        import zstandard

        path = next(folder.glob("dictionary.*"), None)
        if path is None:
            raise Damaged(f"{folder}: the frames want a dictionary, and it is not there")
        content = path.read_bytes()
        if path.suffix != f".{zlib.crc32(content):08x}":
            raise Damaged(f"{path}, offset 0: the dictionary's checksum is not what its name says")
        self._take(zstandard.ZstdCompressionDict(content))

    def compress(self, raw: bytes) -> bytes:
        import zstandard

        if not hasattr(self._of_thread, "compressor"):
            self._of_thread.compressor = zstandard.ZstdCompressor(self._level, self._dictionary)
        return bytes(self._of_thread.compressor.compress(raw))

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        import zstandard

        try:
            # The library makes room for what the header says, whatever limit it is given.
            if zstandard.frame_content_size(stored) != raw_bytes:
                raise _other_size(raw_bytes)
            raw = self._decompressor().decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise _no_frame(self.name, error) from None
        return _whole(raw, raw_bytes)

    def decompress_all(self, stored: Sequence[Buffer], raw_bytes: Sequence[int]) -> bytes:
        """What follows a frame within its bytes goes unnoticed: the library makes all frames in one call."""
        import zstandard

        try:
            for frame, size in zip(stored, raw_bytes, strict=True):
                if zstandard.frame_content_size(frame) != size:
                    raise _other_size(size)
            sizes = struct.pack(f"={len(raw_bytes)}Q", *raw_bytes)
            raw: Any = self._decompressor().multi_decompress_to_buffer(list(stored), decompressed_sizes=sizes)
            return b"".join(raw)
        except zstandard.ZstdError as error:
            raise _no_frame(self.name, error) from None

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        """This thread's."""
        import zstandard

        here = self._of_thread  # another thread may open the data anew meanwhile
        if not hasattr(here, "decompressor"):
            here.decompressor = zstandard.ZstdDecompressor(self._dictionary)
        decompressor: zstandard.ZstdDecompressor = here.decompressor
        return decompressor


def _samples(frames: Iterable[bytes], wanted_bytes: int) -> list[bytes | bytearray | memoryview[int]]:
    """Pieces spread evenly over the frames: of about so many bytes in all, or up to twice as many."""
    samples: list[bytes | bytearray | memoryview[int]] = []
    every = 1
    for number, piece in enumerate(_pieces(frames)):
        if number % every == 0:
            samples.append(piece)
        if len(samples) * _SAMPLE_BYTES > 2 * wanted_bytes:
            samples, every = samples[::2], 2 * every
    return samples


def _pieces(frames: Iterable[bytes]) -> Iterator[bytes]:
    for frame in frames:
        for start in range(0, len(frame), _SAMPLE_BYTES):
            yield frame[start : start + _SAMPLE_BYTES]


def _whole(raw: bytes, raw_bytes: int, left_over_bytes: int = 0) -> bytes:
    """What came out of a frame, if it is what should be in it and nothing follows.

    Raises:
        Damaged: otherwise.
    """
    if len(raw) > raw_bytes:
        raise _too_large(raw_bytes)
    if len(raw) < raw_bytes:
        raise Damaged(f"the frame holds {len(raw)} bytes, and {raw_bytes} should be there")
    if left_over_bytes:
        raise Damaged(f"{left_over_bytes} bytes that belong to nothing follow the frame's end")
    return raw


def _too_large(raw_bytes: int) -> Damaged:
    return Damaged(f"the frame holds more than its {raw_bytes} bytes: decompressing was stopped there")


def _other_size(raw_bytes: int) -> Damaged:
    return Damaged(f"the frame's header does not say that it holds {raw_bytes} bytes")


def _broken_off(made_bytes: int, raw_bytes: int) -> Damaged:
    return Damaged(f"the frame breaks off: {made_bytes} of its {raw_bytes} bytes are there")


def _no_frame(name: str, error: object) -> Damaged:
    return Damaged(f"not a frame of {name}: {error}")
