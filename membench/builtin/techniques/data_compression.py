"""Training data kept compressed, frame by frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from membench.builtin.techniques.data import DataTechnique
from membench.data import codecs
from membench.data.shards import Shards
from membench.plugins import ByteCount, Context, Setting, Unsuitable
from membench.plugins.storage import BLOCK_TOKENS, Codec, Storage


class Compression(DataTechnique):
    """Keeps frames of packed rows compressed, each by itself, so that any of them can be read without the others.

    Attributes:
        frame_tokens: a frame has at most so many tokens, and no more than the block by which rows are shuffled. Small
            frames compress worse; the order of the rows is the same with all.
    """

    frame_tokens: int = Field(BLOCK_TOKENS, ge=2**10, le=BLOCK_TOKENS)

    def refuse(self, setting: Setting) -> str | None:
        if (reason := super().refuse(setting)) is not None:
            return reason
        others = (*setting.before, *setting.after)
        if any(isinstance(other, Compression) for other in others):
            return "data are compressed once, and the stack names two codecs"
        return None

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        if storage.reading == "mapped" or not isinstance(storage.format, Shards):
            raise Unsuitable(
                "a codec's frames have to be decompressed: it is for membench's own shards, read whole or as a stream"
            )
        return dataclasses.replace(storage, codec=self.codec(context), frame_tokens=self.frame_tokens)

    def codec(self, context: Context) -> Codec:
        raise NotImplementedError


class Lzw(Compression):
    """Training data in LZW with codes of up to 16 bits, as compress(1) writes and reads it.

    The longest string that the table has is replaced by its code, and goes into the table with the byte that follows;
    the table of 65,536 is cleared when the ratio falls (Welch, 1984, doi:10.1109/MC.1984.1659158; the code is that of
    ncompress, through the package of that name). Each frame is a file of its own, ``.Z``, which gzip reads too. The
    package keeps Python's lock while it works: reading ahead does not overlap with what else Python does.
    """

    needs: ClassVar[Mapping[str, str]] = {"ncompress": "membench[data]"}
    imports = ("torch", "ncompress")

    def codec(self, context: Context) -> Codec:
        return codecs.Lzw()


class Lzma(Compression):
    """Training data in LZMA2, as xz(1) writes and reads it: the smallest of these, and slow to write.

    LZ77 over a whole frame, then a range coder whose probabilities depend on what came before (liblzma, of Python's
    own library). Compressing takes some ten times a frame, reading little more than one.

    Attributes:
        preset: 0 is the fastest, 9 tries hardest.
    """

    preset: int = Field(6, ge=0, le=9)

    def codec(self, context: Context) -> Codec:
        return codecs.Lzma(self.preset)


class Zstd(Compression):
    """Training data in Zstandard, as zstd(1) writes and reads it: as small as gzip or smaller, and faster to read.

    LZ77 with finite-state and Huffman coding (RFC 8878; through the package zstandard). Small frames have little to
    look back at: a dictionary, trained on pieces from all over the data, is there from the start. It is kept in a file
    beside the frames, and counts as part of the data's size and of the ratio. It pays for frames of some thousand
    tokens, not for those of the default.

    Attributes:
        level: 1 is the fastest, 22 tries hardest.
        dictionary_size: at most so large, '110 KiB' for example; none without it.
    """

    needs: ClassVar[Mapping[str, str]] = {"zstandard": "membench[data]"}
    imports = ("torch", "zstandard")

    level: int = Field(3, ge=1, le=22)
    dictionary_size: Annotated[ByteCount, Field(ge=2**10, le=2**24)] | None = None

    def codec(self, context: Context) -> Codec:
        dictionary_bytes = self.dictionary_size
        if context.rehearsal and dictionary_bytes is not None:
            dictionary_bytes = 2**10  # a larger one cannot be trained on the little that a rehearsal reads
        return codecs.Zstd(self.level, dictionary_bytes)


class Gzip(Compression):
    """Training data in DEFLATE, as gzip(1) writes and reads it.

    LZ77 over the last 32 KiB, and Huffman codes (RFC 1951; zlib, of Python's own library). Frames over some hundred
    KiB gain nothing.

    Attributes:
        level: 1 is the fastest, 9 tries hardest.
    """

    level: int = Field(6, ge=1, le=9)

    def codec(self, context: Context) -> Codec:
        return codecs.Gzip(self.level)


class Bz2(Compression):
    """Training data in Burrows-Wheeler blocks, as bzip2(1) writes and reads it: small, and slow to read.

    Each block is sorted by what follows its bytes, so that like stands by like, then Huffman-coded (Burrows and
    Wheeler, 1994; libbz2, of Python's own library).

    Attributes:
        level: a block is so many times 100,000 bytes; frames larger than that gain nothing.
    """

    level: int = Field(9, ge=1, le=9)

    def codec(self, context: Context) -> Codec:
        return codecs.Bz2(self.level)


class Lz4(Compression):
    """Training data in LZ4, as lz4(1) writes and reads it: the fastest to read, and larger than the others.

    LZ77 over the last 64 KiB with no entropy coding (written through the package lz4, read through pyarrow).

    Attributes:
        level: 0 is the fastest; from 3 on it looks longer for repetitions, which makes reading no slower.
    """

    needs: ClassVar[Mapping[str, str]] = {"lz4": "membench[data]", "pyarrow": "membench[data]"}
    imports = ("torch", "lz4.frame")

    level: int = Field(0, ge=0, le=12)

    def codec(self, context: Context) -> Codec:
        return codecs.Lz4(self.level)


class Brotli(Compression):
    """Training data in Brotli, as brotli(1) writes and reads it.

    LZ77 with Huffman codes that depend on what came before, and a dictionary of common words built in (RFC 7932;
    through the package brotli). Each frame is a file of its own: the format has no mark that a next one begins.

    Attributes:
        quality: 0 is the fastest, 11 tries hardest and writes less than a megabyte a second.
    """

    needs: ClassVar[Mapping[str, str]] = {"brotli": "membench[brotli]"}
    imports = ("torch", "brotli")

    quality: int = Field(5, ge=0, le=11)

    def codec(self, context: Context) -> Codec:
        return codecs.Brotli(self.quality)
