"""Quality on held-out text: the loss of the module, and the divergence of its logits from the reference's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.data import corpus, tokens
from membench.errors import summary
from membench.host.out_of_memory import is_out_of_memory
from membench.protocol.messages import CustomFigure
from membench.protocol.readings import QualityReading
from membench.records.metrics import METRIC_OF_FIELD, is_possible_value
from membench.worker.agreement import come_through, decided_by_first, on_any
from membench.worker.time_budget import TimeBudget

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.plugins import Context, QualityMetric, Technique, Workload

_PIECE_TOKENS = 256
_FEWEST_PIECES = 8  # for a standard error
_LARGEST_REFERENCE_BYTES = 64 * 2**20
_PIECES = "pieces"  # names the reading of held-out text to the other ranks
_NO_REFERENCE = "the reference's logits are not there"
NOT_JUDGED = "quality was not judged: evaluate_s = 0"


@dataclass(frozen=True)
class Piece:
    """A sequence of held-out tokens.

    Attributes:
        ids: the token ids; the first is given, the others are predicted.
        bytes: the bytes of text that the predicted tokens encode; ``None`` if not known.
    """

    ids: list[int]
    bytes: int | None


def pieces(
    model: Any, module: nn.Module, workload: Workload, predicted: int | None = None, longest: int | None = None
) -> list[Piece]:
    """Return the held-out text for a model, as much as keeps the reference's logits below 64 MiB.

    A piece has 256 tokens, or fewer if there would be less than eight pieces. For a workload that generates, it has at
    least the workload's longest sequence, so that the quality loss of its cache is measured. Bytes are known if tokens
    are bytes or if the model's tokenizer reports them.

    Args:
        predicted: the vocabulary of the logits, where it is larger than the model's.
        longest: the most tokens that the model takes, if it does not say that itself.
    """
    vocabulary = model.vocabulary(module)
    most_tokens = max(2, _LARGEST_REFERENCE_BYTES // (4 * max(vocabulary, predicted or 0)))
    preferred = max(1, min(_PIECE_TOKENS, most_tokens // _FEWEST_PIECES))
    if workload.decoded_tokens_per_step() is not None:
        preferred = max(preferred, workload.longest_sequence())
    longest = model.max_tokens() or longest
    length = min(preferred, most_tokens, preferred if longest is None else longest)
    text = corpus.split()[1]
    ends: Sequence[int] | None
    source: Sequence[int]
    if (encoded := model.encode(text)) is not None:
        source, ends = encoded, model.token_ends(text)
    elif (spec := workload.corpus()) is not None and tokens.are_words(model, vocabulary):
        ranks = tokens.words_of(spec.source, spec.most_bytes).ranks(text)
        source, ends = [min(rank, vocabulary - 1) for rank in ranks], None
    else:
        source = corpus.ids(vocabulary, held_out=True)
        ends = range(1, len(source) + 1) if vocabulary <= 256 else None
    found = []
    for start in range(0, min(len(source) - 1, most_tokens // length * length), length):
        ids = [token % vocabulary for token in source[start : start + length + 1]]
        found.append(Piece(ids, None if ends is None else ends[start + len(ids) - 1] - ends[start]))
    return found


def evaluate(
    model: Any,
    module: nn.Module,
    techniques: Sequence[Technique],
    workload: Workload,
    context: Context,
    reference: Path,
    is_reference: bool,
    within_s: float | None = None,
) -> QualityReading:
    """Measure the held-out loss and, if the reference's logits are available, the divergence from them.

    As many pieces of text are judged as the time allows, and no more than were judged of the reference: so each has its
    pair there. Ranks go through the same pieces, as the first one's time allows.

    Args:
        workload: computes the logits, possibly through a key-value cache.
        reference: the file of the reference's logits (tokens, vocabulary), fp32.
        is_reference: whether this case is the reference; then the file is written.
        within_s: about how long it may take; one piece is judged in any case. ``None``: as long as it takes.
    """
    import numpy
    import torch

    from membench.plugins import WrongOutput

    budget = TimeBudget(within_s)
    logits_of = functools.partial(_logits, module, techniques, workload, context)
    try:
        held_out, predicted = _pieces_of_logits(model, module, workload, logits_of, context)
    except WrongOutput as error:  # the workload can do with the logits of the last position
        return QualityReading(unknown=str(error))
    count = sum(len(piece.ids) - 1 for piece in held_out)
    partial = reference.with_suffix(f".{os.getpid()}")
    logits_kept: Any = None
    if is_reference:
        reference.parent.mkdir(parents=True, exist_ok=True)
        logits_kept = numpy.lib.format.open_memmap(partial, "w+", numpy.float32, (count, predicted))
    else:
        logits_kept = _kept_logits(reference)
    judges = context.ranks is None or context.ranks.number == 0  # the others only go through the same pieces
    nats, reference_nats, divergence, agreed, position = [], [], 0.0, 0, 0
    with torch.no_grad():
        for number, piece in enumerate(held_out, 1):
            rows = slice(position, position + len(piece.ids) - 1)
            if not is_reference and logits_kept is not None and rows.stop > len(logits_kept):
                break  # the reference was judged over no more
            ids = torch.tensor(piece.ids, dtype=torch.long, device=context.device)
            # In half precision, rounding of the loss would exceed the effect of quantization.
            logits = logits_of(ids[:-1]).float()
            own = logits.log_softmax(-1)
            nats.append(-own.gather(1, ids[1:, None]).sum().item())
            position = rows.stop
            if is_reference:
                logits_kept[rows] = logits.cpu().numpy()
            elif logits_kept is not None and judges:
                theirs = torch.tensor(logits_kept[rows], device=context.device).log_softmax(-1)
                reference_nats.append(-theirs.gather(1, ids[1:, None]).sum().item())
                divergence += (theirs.exp() * (theirs - own)).sum(dtype=torch.float64).item()
                agreed += int((theirs.argmax(-1) == own.argmax(-1)).sum())
            if decided_by_first(context.ranks, budget.is_used_up(number, len(held_out) - number)):
                break
    if is_reference:
        logits_kept.flush()
        if position < count:
            _keep_rows(logits_kept, position, partial)
        os.replace(partial, reference)
    judged = held_out[: len(nats)]
    own_loss = QualityReading(
        nats=[_finite(each) for each in nats],
        tokens=[len(piece.ids) - 1 for piece in judged],
        bytes=[piece.bytes for piece in judged],
        all_pieces=len(held_out) if len(judged) < len(held_out) else None,
    )
    if not is_reference and logits_kept is None:
        return dataclasses.replace(own_loss, unknown=_NO_REFERENCE)
    if not reference_nats:
        return own_loss
    # For logits that are NaN, argmax returns the first token, which the reference may predict by chance.
    top1_agreement = agreed / position * 100 if math.isfinite(divergence) else math.nan
    return dataclasses.replace(
        own_loss,
        reference_nats=[_finite(each) for each in reference_nats],
        kl_nats=_finite(_not_negative(divergence / position)),  # rounding of fp32 logarithms can make it negative
        top1_agreement_percent=_finite(top1_agreement),
    )


def note_on_time(found: QualityReading) -> str | None:
    """Return a note if quality was judged over less text than there is."""
    if found.all_pieces is None:
        return None
    pieces_judged, tokens_judged = len(found.tokens), sum(found.tokens)
    return (
        f"quality was judged over {pieces_judged} of {found.all_pieces} pieces of held-out text, {tokens_judged}"
        " tokens: there was no time for more within the setting evaluate_s, here or for the reference"
    )


def custom_figures(
    metrics: Mapping[str, QualityMetric],
    model: Any,
    module: nn.Module,
    techniques: Sequence[Technique],
    workload: Workload,
    context: Context,
    reference: Path,
    most_pieces: int | None = None,
) -> tuple[dict[str, CustomFigure], list[str]]:
    """Measure custom quality metrics.

    Args:
        metrics: the metrics, by field.
        most_pieces: over how many pieces of text ``evaluate`` judged; ``None``: over all.
        reference: the file of the reference's logits, written by ``evaluate``.

    Returns:
        the values by field, and remarks on the metrics that failed.
    """
    import torch

    from membench.plugins import HeldOut, Unsuitable, WrongOutput

    logits = functools.partial(_logits, module, techniques, workload, context)
    found: dict[str, CustomFigure] = {}
    remarks = []
    held_out = None
    if metrics:
        try:
            given = [piece.ids for piece in _pieces_of_logits(model, module, workload, logits, context)[0]]
        except WrongOutput as error:
            return {field: CustomFigure(None, str(error)) for field in metrics}, []
        given = given[:most_pieces]
        starts = list(itertools.accumulate((len(ids) - 1 for ids in given), initial=0))

        logits_kept = _kept_logits(reference)

        def of_reference(number: int) -> torch.Tensor:
            if logits_kept is None:
                raise Unsuitable(_NO_REFERENCE)
            return torch.tensor(logits_kept[starts[number] : starts[number + 1]], device=context.device)

        held_out = HeldOut(given, logits, of_reference)
    for field, metric in metrics.items():
        value, reason = None, None
        try:
            assert held_out is not None
            with torch.no_grad():
                value = float(metric.measure(module, held_out, context))
            if not math.isfinite(value):
                value, reason = None, "it is not finite"
            elif not is_possible_value(field, value):
                value, reason = None, f"{value:g} is no size of a figure"
            if reason is not None:
                remarks.append(f"metric '{METRIC_OF_FIELD[field].name}' is not known: {reason}")
        except Unsuitable as error:
            come_through(context.ranks, field, error)
            reason = str(error)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            come_through(context.ranks, field, error)
            reason = f"measuring it ended in {summary(error)}"
            remarks.append(f"metric '{METRIC_OF_FIELD[field].name}' is not known: {reason}")
        come_through(context.ranks, field)
        found[field] = CustomFigure(value, reason)
    return found, remarks


def _logits(
    module: nn.Module, techniques: Sequence[Technique], workload: Workload, context: Context, ids: torch.Tensor
) -> torch.Tensor:
    """Return logits (T, vocabulary) of token ids (T,), computed as the workload runs the module."""
    from membench.plugins import Parallel, stepping

    with stepping(techniques, context):
        logits = workload.logits(module, ids, techniques, context)
    for technique in techniques:
        if isinstance(technique, Parallel):
            logits = technique.whole_logits(logits, context)
    return logits


def _pieces_of_logits(
    model: Any,
    module: nn.Module,
    workload: Workload,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    context: Context,
) -> tuple[list[Piece], int]:
    """Return the held-out text for a model, and the vocabulary of its logits, which may exceed that of its text.

    A model that does not say how many tokens it takes may take no more than the workload's sequences have.
    Ranks find that out together.

    Raises:
        WrongOutput: if it does not return the logits of every position.
    """
    import torch

    from membench.plugins import WrongOutput

    def read(longest: int | None) -> tuple[list[Piece], int]:
        found = pieces(model, module, workload, longest=longest)
        with torch.no_grad():
            first = logits_of(torch.tensor(found[0].ids[:-1], dtype=torch.long, device=context.device))
        return found, first.shape[-1]

    longest, again = None, False
    try:
        found, predicted = read(longest)
    except WrongOutput as error:
        come_through(context.ranks, _PIECES, error)
        on_any(context.ranks, True)
        raise
    except Exception as error:
        if model.max_tokens() is not None or is_out_of_memory(error):
            raise
        come_through(context.ranks, _PIECES, error)
        again = True
    else:
        come_through(context.ranks, _PIECES)
    if on_any(context.ranks, False):
        raise WrongOutput("does not return the logits of every position on another rank")
    if on_any(context.ranks, again):
        longest = max(1, workload.longest_sequence())
        found, predicted = read(longest)
    is_padded = predicted > model.vocabulary(module)
    return (pieces(model, module, workload, predicted, longest) if is_padded else found), predicted


def _kept_logits(reference: Path) -> Any | None:
    """Map the file of the reference's logits (tokens, vocabulary); ``None`` if there is none."""
    import numpy

    return numpy.load(reference, mmap_mode="r") if reference.exists() else None


def _keep_rows(logits: Any, count: int, path: Path) -> None:
    """Replace the file of logits by one of its first rows."""
    import numpy

    shortened = path.with_suffix(f"{path.suffix}-shortened")
    with open(shortened, "wb") as file:
        numpy.save(file, logits[:count])
    os.replace(shortened, path)


def _not_negative(value: float) -> float:
    return value if math.isnan(value) else max(0.0, value)


def _finite(value: float) -> float | None:
    """Replace a number that is not finite by ``None``, since JSON cannot represent it."""
    return value if math.isfinite(value) else None
