"""A codec with a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from membench.plugins.storage import Buffer, Codec


class Timed:
    """Another codec, with the time and the bytes that went through it; each way by itself."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.name, self.ending, self.joins = codec.name, codec.ending, codec.joins
        self.raw_bytes = self.stored_bytes = self.decompressed_bytes = 0
        self.compress_s = self.decompress_s = 0.0

    def afresh(self) -> Timed:
        """The same codec with a clock at zero."""
        return Timed(self._codec)

    def learn(self, frames: Iterable[bytes], folder: Path) -> None:
        began, made_s = time.perf_counter(), 0.0

        def made() -> Iterator[bytes]:
            nonlocal made_s
            asked = time.perf_counter()
            for frame in frames:
                made_s += time.perf_counter() - asked
                yield frame
                asked = time.perf_counter()

        self._codec.learn(made(), folder)
        self.compress_s += time.perf_counter() - began - made_s  # packing is none of the codec's
        self.stored_bytes += sum(path.stat().st_size for path in folder.iterdir())  # a dictionary is read with the rest

    def remember(self, folder: Path) -> None:
        self._codec.remember(folder)

    def compress(self, raw: bytes) -> bytes:
        began = time.perf_counter()
        stored = self._codec.compress(raw)
        self.compress_s += time.perf_counter() - began
        self.raw_bytes += len(raw)
        self.stored_bytes += len(stored)
        return stored

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        return self._decompressed(lambda: self._codec.decompress(stored, raw_bytes))

    def decompress_all(self, stored: Sequence[Buffer], raw_bytes: Sequence[int]) -> bytes:
        return self._decompressed(lambda: self._codec.decompress_all(stored, raw_bytes))

    def _decompressed(self, decompress: Callable[[], bytes]) -> bytes:
        began = time.perf_counter()
        raw = decompress()
        self.decompress_s += time.perf_counter() - began
        self.decompressed_bytes += len(raw)
        return raw
