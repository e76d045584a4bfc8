"""What a deep model needs, from the same model with few of its layers.

Of layers that are alike each adds the same to what is alive at a moment of a step: moments are matched between two
models, one a layer deeper than the other, and each is extended by itself. Which of them is the highest is found at the
end, since another one overtakes as layers are added: the maximum of a phase does not grow linearly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from membench.host.device import Device
from membench.plugins import Technique
from membench.plugins.parallel import Parallel
from membench.protocol.readings import RankEstimate
from membench.protocol.requests import MeasureCase
from membench.worker.tracing.fake_ranks import alike
from membench.worker.tracing.ledger import BETWEEN, Moment
from membench.worker.tracing.traced_case import PARTS, TracedRank, assembly, traced

_LAYERS = 3
"""Of a stage of the shallower model. With fewer, FSDP does not gather one layer while another one runs."""
_WORTHWHILE = 3
"""How many times as deep a model has to be as the shallower one: else it is traced whole, which takes no longer."""
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
    shallow = _LAYERS * stages
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
    fewer, fewer_moments = TracedRank(case, device, None, ranks[0], scratch, shallow).step()
    more, more_moments = TracedRank(case, device, None, ranks[0], scratch, deeper).step()
    times = (whole - shallow) // (deeper - shallow)
    figures = {field: size + (more[field] - size) * times for field, size in fewer.items()}
    if "trained_weights_bytes" in figures:
        figures["frozen_weights_bytes"] = figures["weights_bytes"] - figures["trained_weights_bytes"]
    peaks: dict[str, int] = {}
    for part, live_bytes in extended(fewer_moments, more_moments, times):
        peaks[part] = max(peaks.get(part, 0), live_bytes)
    figures["peak_live_bytes"] = max(peaks.values())
    peaks.pop(BETWEEN, None)
    figures |= {f"{part}_peak_live_bytes": peak for part, peak in peaks.items() if part in PARTS}
    return RankEstimate(
        ranks=ranks,
        how="traced",
        figures=figures,
        peak_part=max(peaks, key=lambda part: peaks[part], default=None),
        leaves_out=(LEFT_OUT,),
        from_layers=(shallow, deeper),
    )


def extended(fewer: Sequence[Moment], more: Sequence[Moment], times: int) -> Iterator[tuple[str, int]]:
    """Yield the live bytes of a step at moments of a model that is deeper by so many layers, each with its part.

    In each part of the step, moments are matched from its begin and from its end, as far as the same happens in both
    models. In between lie those of the added layer, which are like the ones before or after it.

    Args:
        fewer: the moments of the shallower model.
        more: of a model with one more layer.
        times: how many layers more than the shallower model the deeper one has.

    Raises:
        Unlike: if some moments have none to match.
    """
    shallow, deep = _runs(fewer), _runs(more)
    if [run[0].part for run in shallow] != [run[0].part for run in deep]:
        raise Unlike
    for run, longer in zip(shallow, deep, strict=True):
        first, last = _alike(run, longer), _alike(run[::-1], longer[::-1])
        if first + last < len(run):
            raise Unlike
        pairs = itertools.chain(
            zip(run[:first], longer, strict=False), zip(run[::-1][:last], longer[::-1], strict=False)
        )
        for one, other in pairs:
            yield one.part, one.live_bytes + (other.live_bytes - one.live_bytes) * times


def _runs(moments: Sequence[Moment]) -> list[list[Moment]]:
    """Return moments of the same part that follow each other, together."""
    return [list(run) for _, run in itertools.groupby(moments, key=lambda each: each.part)]


def _alike(run: Sequence[Moment], other: Sequence[Moment]) -> int:
    """Return at how many moments from the first the same happens in both."""
    pairs = zip(run, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0].what == pair[1].what, pairs))
