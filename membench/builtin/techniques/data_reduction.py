"""Less text to train on: near-duplicates taken out, or a part of the documents chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from membench.builtin.models.trained_tiny import PIECE_BYTES, TrainedTiny, seed_of
from membench.builtin.techniques.data import DataTechnique
from membench.plugins import Context, Unsuitable, logits_of

if TYPE_CHECKING:
    from torch import nn

_REHEARSED_DOCUMENTS = 16
_FOUND_AT_THRESHOLD = 0.99
_SCORED_BYTES = 4096
_PIECES_AT_ONCE = 16


class _LessText(DataTechnique):
    """Keeps some of the documents, and says how much that is."""

    def kept(self, documents: Sequence[bytes], context: Context) -> Sequence[bytes]:
        raise NotImplementedError

    def corpus(self, documents: Sequence[bytes], context: Context) -> Sequence[bytes]:
        if context.rehearsal:
            self.kept(documents[:_REHEARSED_DOCUMENTS], context)
            return documents
        kept = self.kept(documents, context)
        before, after = sum(map(len, documents)), sum(map(len, kept))
        if not after:
            raise Unsuitable(f"nothing is left of {before:,} bytes of text")
        earlier_percent, earlier = context.facts.get("corpus_kept_percent", (100.0, ""))
        how = f"{len(kept):,} of {len(documents):,} documents, {after:,} of {before:,} bytes"
        context.facts["corpus_kept_percent"] = (
            earlier_percent * after / before,
            f"{earlier}, then {how}" if earlier else how,
        )
        return kept


class Dedup(_LessText):
    """Near-duplicate documents taken out by MinHash: of each cluster the first stays (Lee et al., 2021; datasketch).

    Two documents are near where their sets of shingles, the runs of so many words, have a Jaccard similarity
    s = |A ∩ B| / |A ∪ B| of at least the threshold; what near pairs connect is a cluster (arXiv:2107.06499). s is the
    chance that the least hash of both sets under a random permutation is the same (Broder, 1997). b bands of r such
    hashes each find a pair with a chance of 1 - (1 - s^r)^b, without comparing all with all; r is the largest with
    which that is 99% at the threshold. Pairs that are found are then compared by their shingles themselves: none below
    the threshold goes, and of those that lie right at it one in a hundred is missed.

    Limits: words are what stands between white space, and how much of that there is does not count. A document shorter
    than a shingle is near only to one of the same words. A long document that contains a short one is not near to it.

    Attributes:
        threshold: Jaccard similarity from which on two documents are near.
        permutations: hashes kept of a document while the corpus is gone through.
        shingle_words: words of a shingle.
    """

    imports: ClassVar[tuple[str, ...]] = ("torch", "datasketch")
    needs: ClassVar[Mapping[str, str]] = {"datasketch": "membench[data]"}
    threshold: float = Field(0.8, gt=0, le=1)
    permutations: int = Field(256, ge=16, le=4096)
    shingle_words: int = Field(5, ge=1, le=100)

    def kept(self, documents: Sequence[bytes], context: Context) -> Sequence[bytes]:
        from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

        distinct = list(dict.fromkeys(documents))
        index = MinHashLSH(num_perm=self.permutations, params=self.bands())
        empty = MinHash(num_perm=self.permutations)
        first_of_cluster = list(range(len(distinct)))

        def first(number: int) -> int:
            while first_of_cluster[number] != number:
                first_of_cluster[number] = first_of_cluster[first_of_cluster[number]]
                number = first_of_cluster[number]
            return number

        for number, document in enumerate(distinct):
            own = shingles(document, self.shingle_words)
            sketch = empty.copy()
            sketch.update_batch(own)
            for other in index.query(sketch):
                ends = sorted((first(number), first(other)))
                if ends[0] != ends[1] and self._near(own, shingles(distinct[other], self.shingle_words)):
                    first_of_cluster[ends[1]] = ends[0]
            index.insert(number, sketch, check_duplication=False)
        return [document for number, document in enumerate(distinct) if first(number) == number]

    def bands(self) -> tuple[int, int]:
        """How many bands, and hashes in each."""
        sizes = range(1, self.permutations // 2 + 1)
        found = [size for size in sizes if self._chance(size) >= _FOUND_AT_THRESHOLD]
        size = max(found, default=1)
        return self.permutations // size, size

    def _chance(self, size: int) -> float:
        """Of finding a pair at the threshold, with bands of so many hashes."""
        return 1 - (1 - self.threshold**size) ** (self.permutations // size)

    def _near(self, one: set[bytes], other: set[bytes]) -> bool:
        shared = len(one & other)
        return shared >= self.threshold * (len(one) + len(other) - shared)


class Subset(_LessText):
    """A share of the text: the documents of middling perplexity, or what chance gives, which that must be held against.

    ``perplexity``: documents by the bits per byte that they cost trained-tiny, and of these the middle by bytes, for
    the easiest repeat themselves and the hardest are noise (Marion et al., 2023, arXiv:2309.04564, where the middle
    of the distribution did best). ``random``: documents drawn without replacement. Both keep the order, and cut the
    last document that they take, so that the bytes are the same.

    Limits: trained-tiny has learnt from ``topics``, and is better at that text than at any other; a document's score is
    that of its first 4,096 bytes, in pieces of 256. A middle pays where a corpus is large and much of it bad; of
    ``topics``, which has no noise, it leaves out kinds of text, and loses far more than chance does
    (suites/less-data.toml).

    Attributes:
        share: of the text's bytes.
        by: what is gone by.
    """

    imports: ClassVar[tuple[str, ...]] = TrainedTiny.imports
    share: float = Field(0.25, gt=0, lt=1)
    by: Literal["perplexity", "random"] = "perplexity"

    def prepare(self, make: object, context: Context) -> None:
        if self.by == "perplexity" and not context.rehearsal:
            TrainedTiny().prepare(lambda done, total, what: None)

    def kept(self, documents: Sequence[bytes], context: Context) -> Sequence[bytes]:
        import numpy

        if self.by == "random":
            order = numpy.random.default_rng(seed_of(context)).permutation(len(documents)).tolist()
        else:
            module = TrainedTiny().build(context).eval()
            order = middle_first(bits_per_byte(documents, module, context.device), [len(each) for each in documents])
        left = round(self.share * sum(map(len, documents)))
        kept: dict[int, bytes] = {}
        for place in order:
            if left <= 0:
                break
            kept[place] = documents[place][:left]
            left -= len(kept[place])
        return [kept[place] for place in sorted(kept)]


def shingles(document: bytes, size: int) -> set[bytes]:
    """Runs of so many words; all of them where there are fewer."""
    words = document.split()
    return {b" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


def middle_first(scores: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Places of documents: first the one in whose middle half of all bytes, ordered by score, are passed."""
    import numpy

    by_score = numpy.argsort(scores, kind="stable")
    ordered = numpy.asarray(sizes)[by_score]
    middles = numpy.cumsum(ordered) - ordered / 2
    from_half = numpy.abs(middles - ordered.sum() / 2)
    found: list[int] = by_score[numpy.argsort(from_half, kind="stable")].tolist()
    return found


def bits_per_byte(documents: Sequence[bytes], module: nn.Module, device: str) -> list[float]:
    """What each document's beginning costs a model of bytes that takes it for the start of a line."""
    import numpy
    import torch

    pieces = [(place, piece) for place, document in enumerate(documents) for piece in _pieces(document[:_SCORED_BYTES])]
    pieces.sort(key=lambda numbered: len(numbered[1]))
    bits = numpy.zeros(len(documents))
    with torch.no_grad():
        for start in range(0, len(pieces), _PIECES_AT_ONCE):
            some = pieces[start : start + _PIECES_AT_ONCE]
            ids = torch.full((len(some), len(some[-1][1])), -1)
            for row, (_, piece) in zip(ids, some, strict=True):
                row[: len(piece)] = torch.tensor(list(piece))
            ids = ids.to(device)
            given = ids[:, :-1].clamp(min=0)
            logits = logits_of(module(given), given).float()
            nats = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], ignore_index=-1, reduction="none").sum(1)
            numpy.add.at(bits, [place for place, _ in some], nats.cpu().double().numpy() / numpy.log(2))
    found: list[float] = (bits / [len(document[:_SCORED_BYTES]) for document in documents]).tolist()
    return found


def _pieces(document: bytes) -> Iterator[bytes]:
    """Pieces to read, each with the byte before it in front."""
    text = b"\n" + document
    return (text[start : start + PIECE_BYTES + 1] for start in range(0, len(document), PIECE_BYTES))
