"""What a deep model needs, from the same model with few of its layers.

Of layers that are alike each adds the same to what is alive at a moment of a step: moments are matched between two
models, one a layer deeper than the other, and each is extended by itself. Which of them is the highest is found at the
end, since another one overtakes as layers are added: the maximum of a phase does not grow linearly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from membench.host.device import Device
from membench.plugins import Technique
from membench.plugins.parallel import Parallel
from membench.protocol.readings import PARTS, RankEstimate
from membench.protocol.requests import MeasureCase
from membench.worker.tracing.fake_ranks import alike
from membench.worker.tracing.ledger import BETWEEN, Moment
from membench.worker.tracing.traced_case import TracedRank, assembly, traced

_LAYERS = 3
"""Of the shallower model. With fewer, FSDP does not gather one layer while another one runs."""
_LAYERS_OF_STAGE = 2
"""Of each stage of a pipeline, which is not sharded."""
_WORTHWHILE = 3
"""How many times as deep a model has to be as the shallower one: else it is traced whole, which takes no longer."""
_ENOUGH = 16
"""Moments in which the same happens, after which two runs are taken to be at the same place."""
LEFT_OUT = "what loading, converting and saving take: steps alone were traced"


class Unlike(Exception):
    """Two models of which one is deeper do not differ by a layer alone."""


def extrapolated(case: MeasureCase, device: Device, scratch: Path) -> Iterator[RankEstimate]:
    """Trace a case with few layers, and yield what all of them would need, for each rank that differs from the others.

    A case whose layers differ, or whose ranks do not share them evenly, is traced whole.

    Args:
        device: where the case runs.
        scratch: the folder for what stages write.

    Raises:
        Exception: as for ``traced``.
    """
    whole = assembly(case, device, 0, scratch)
    groups = alike(whole.techniques, device.count) if device.in_ranks else [[0]]
    stages, layers = len(groups), whole.model.depth()
    shallow = (_LAYERS if stages == 1 else _LAYERS_OF_STAGE) * stages
    if layers is None or layers % stages or layers < _WORTHWHILE * shallow or _by_parameters(whole.techniques):
        yield from traced(case, device, None, scratch)
        return
    try:
        yield from [_of_rank(case, device, ranks, scratch, (shallow, shallow + stages, layers)) for ranks in groups]
    except Unlike:
        yield from traced(case, device, None, scratch)


def _by_parameters(techniques: Sequence[Technique]) -> bool:
    """Whether a rank's share is of the list of all parameters, so that another layer may go to another rank."""
    return any(isinstance(each, Parallel) and each.shares_states for each in techniques)


def _of_rank(
    case: MeasureCase, device: Device, ranks: Sequence[int], scratch: Path, layers: tuple[int, int, int]
) -> RankEstimate:
    shallow, deeper, whole = layers
    added = deeper - shallow

    def step(depth: int) -> tuple[dict[str, int], list[Moment]]:
        return TracedRank(case, device, None, ranks[0], scratch, depth).step()

    fewer, fewer_moments = step(shallow)
    more, more_moments = step(deeper)
    times = (whole - shallow) // added
    from_layers: tuple[int, ...] = (shallow, deeper)
    figures = {field: size + (more[field] - size) * times for field, size in fewer.items()}
    try:
        peaks = _peaks(extended((fewer_moments, more_moments), times))
    except Unlike:
        _, third_moments = step(deeper + added)
        three, from_layers = (fewer_moments, more_moments, third_moments), (*from_layers, deeper + added)
        if _peaks(extended(three, 2)) != _peaks((each.part, each.live_bytes) for each in third_moments):
            raise
        peaks = _peaks(extended(three, times))
    figures["peak_live_bytes"] = max(peaks.values())
    peaks.pop(BETWEEN, None)
    figures |= {f"{part}_peak_live_bytes": peak for part, peak in peaks.items() if part in PARTS}
    return RankEstimate(
        ranks=ranks,
        how="traced",
        figures=figures,
        peak_part=max(peaks, key=lambda part: peaks[part], default=None),
        leaves_out=(LEFT_OUT,),
        from_layers=from_layers,
    )


def _peaks(moments: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the most live bytes of each part."""
    peaks: dict[str, int] = {}
    for part, live_bytes in moments:
        peaks[part] = max(peaks.get(part, 0), live_bytes)
    return peaks


def extended(models: Sequence[Sequence[Moment]], times: int) -> Iterator[tuple[str, int]]:
    """Yield the live bytes of a step at moments of a model that is deeper by so many layers, each with its part.

    In each part of the step, moments are matched from its begin, and once more from its end: then the first layers and
    the last ones of both models are matched. In between lie those of the added layers, which are like these.

    Args:
        models: the moments of the shallowest model, and of one with one more layer. If what a layer adds to a part lies
            in several places, as with micro-batches, what looks alike after each of them need not be: then also those
            of a third model, with two more layers, and moments that do not grow evenly are left out.
        times: how many layers more than the shallowest model the deeper one has.

    Raises:
        Unlike: if moments have none to match.
    """
    runs = [_runs(each) for each in models]
    if any([run[0].part for run in each] != [run[0].part for run in runs[0]] for each in runs):
        raise Unlike
    for run, *longer in zip(*runs, strict=True):
        for one, other in _matched(run, *longer) if len(longer) == 1 else _matched_apart(run, *longer):
            yield one.part, one.live_bytes + (other.live_bytes - one.live_bytes) * times


def _runs(moments: Sequence[Moment]) -> list[list[Moment]]:
    """Return moments of the same part that follow each other, together."""
    return [list(run) for _, run in itertools.groupby(moments, key=lambda each: each.part)]


def _matched(run: Sequence[Moment], longer: Sequence[Moment]) -> Iterator[tuple[Moment, Moment]]:
    first, last = _alike(run, longer), _alike(run[::-1], longer[::-1])
    if first + last < len(run):
        raise Unlike
    yield from zip(run[:first], longer, strict=False)
    yield from zip(run[::-1][:last], longer[::-1], strict=False)


def _alike(run: Sequence[Moment], other: Sequence[Moment]) -> int:
    """Return at how many moments from the first the same happens in both."""
    pairs = zip(run, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0].what == pair[1].what, pairs))


def _matched_apart(
    run: Sequence[Moment], longer: Sequence[Moment], longest: Sequence[Moment]
) -> Iterator[tuple[Moment, Moment]]:
    for step in (1, -1):
        found = zip(_found_again(run[::step], longer[::step]), _found_again(run[::step], longest[::step]), strict=True)
        for (one, other), (_, third) in found:
            if third.live_bytes - other.live_bytes == other.live_bytes - one.live_bytes:
                yield one, other


def _found_again(run: Sequence[Moment], longer: Sequence[Moment]) -> Iterator[tuple[Moment, Moment]]:
    """Yield each moment of a run with the next of a longer run from which on the same happens for a while."""
    what, in_longer = [each.what for each in run], [each.what for each in longer]
    skipped = 0
    for place, each in enumerate(what):
        if place + skipped >= len(longer) or in_longer[place + skipped] != each:
            skipped = _next_alike(what[place : place + _ENOUGH], in_longer, place + skipped, len(what) - place) - place
        yield run[place], longer[place + skipped]


def _next_alike(ahead: list[Any], longer: list[Any], begin: int, left: int) -> int:
    """Return the next place at which the same follows as in the shorter run, of which so much is left."""
    for place in range(begin + 1, len(longer) - left + 1):
        if longer[place : place + len(ahead)] == ahead:
            return place
    raise Unlike
