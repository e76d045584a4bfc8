"""Estimates of a case of which one technique does not run on fake tensors: the rest traced, and what it names put in.

A technique names bits of a weight, the share of the weights that remains, bytes of optimizer states, or bits of the
key-value cache (``nominal_…``). What follows from neither these nor the rest of the case is no figure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from membench.errors import summary
from membench.host.device import Device
from membench.plugins import SelectsLayers, Technique, Unsuitable, output_head
from membench.protocol.readings import PARTS, Number, RankEstimate
from membench.protocol.requests import MeasureCase
from membench.worker.assembly import create
from membench.worker.tracing.traced_case import TracedRank, untraceable

KEPT_AS_THEY_ARE = "changes of embeddings, norms, biases and the output head, which were taken to stay as they are"
SCALES = "scales, zero points and indices of weights"
UNPACKED = "weights that are unpacked to compute with them"
TRAINED = "peaks of training weights that it converts"
STEP_OF_OPTIMIZER = "what the optimizer's step takes besides its states"
OF_CACHE = "scales of the cache, tokens that it keeps as they are, and what is unpacked to compute with it"
_TIMES_OF_PEAKS = ("load", "apply", "warmup", "save")
_TRAINING = ("gradients", "activations", "optimizer_state", "trained_weights", "frozen_weights")


def by_arithmetic(
    case: MeasureCase, device: Device, threads: int | None, scratch: Path, error: Exception
) -> RankEstimate:
    """Estimate a case without the member of its stack that does not run on fake tensors, and put in what that names.

    Args:
        device, threads, scratch: as for ``traced``.
        error: what the whole case ended in.

    Raises:
        plugins.Unsuitable: if no member without which the case runs names anything, or if the case is on ranks.
    """
    reason = untraceable(error)
    if device.in_ranks:
        raise Unsuitable(reason) from error
    for position in reversed(range(len(case.techniques))):
        technique: Technique = create("technique", case.techniques[position])
        if not _names_something(technique):
            continue
        without = _without(case, position)
        with contextlib.suppress(Exception):  # it is not this member alone
            rank = TracedRank(without, device, threads, 0, scratch)
            traced = rank.estimate([0])
            assert rank.module is not None
            left_out = f"what '{case.members[position]}' takes besides (on fake tensors it ends in {summary(error)})"
            adapts = any(create("technique", each).trains_adapters for each in without.techniques)
            return _with_technique(traced, rank.module, technique, adapts, left_out)
    raise Unsuitable(f"{reason}, and no technique names what it takes (nominal_…)") from error


def _without(case: MeasureCase, position: int) -> MeasureCase:
    after = position + 1
    return replace(
        case,
        techniques=[*case.techniques[:position], *case.techniques[after:]],
        members=[*case.members[:position], *case.members[after:]],
    )


def _names_something(technique: Technique) -> bool:
    named = (technique.nominal_bits(), technique.nominal_state_bytes(), technique.nominal_cache_bits())
    return any(each is not None for each in named) or technique.nominal_share() not in (None, 1)


@dataclass
class _Figures:
    """Those of a traced case, which change as a technique is put in.

    Attributes:
        breakdown: live memory at the peak of each part, by part and category.
    """

    values: dict[str, Number]
    breakdown: dict[str, dict[str, int]]
    leaves_out: list[str] = field(default_factory=list)

    def drop(self, *names: str) -> None:
        for name in names:
            self.values.pop(name, None)

    def drop_peaks(self) -> None:
        for name in [name for name in self.values if "live_bytes" in name]:
            del self.values[name]
        self.breakdown.clear()

    def drop_part(self, part: str) -> None:
        """Leave a part of the step out of the peak, too."""
        self.drop(f"{part}_peak_live_bytes")
        self.breakdown.pop(part, None)
        self.peak_of_parts()

    def peak_of_parts(self) -> None:
        """Find the peak of the step anew; without parts it is no figure."""
        rest = [int(self.values[name]) for each in PARTS if (name := f"{each}_peak_live_bytes") in self.values]
        if rest:
            self.values["peak_live_bytes"] = max(rest)
        else:
            self.drop("peak_live_bytes")

    def hold_less(self, size_bytes: int, category: str) -> None:
        """Take off what is held during the whole step."""
        for name in ("peak_live_bytes", "held_live_bytes", *(f"{part}_peak_live_bytes" for part in PARTS)):
            if name in self.values:
                self.values[name] -= size_bytes
        for held in self.breakdown.values():
            held[category] = held.get(category, 0) - size_bytes


def _with_technique(
    traced: RankEstimate, module: nn.Module, technique: Technique, adapts: bool, left_out: str
) -> RankEstimate:
    """Return an estimate with what a technique names put in.

    Args:
        traced: the case without it.
        module: the module of that case, of fake tensors, after its steps.
        adapts: whether another technique freezes the weights and trains parameters of its own.
        left_out: the technique, and why it is not traced.
    """
    breakdown = {part: dict(held) for part, held in (traced.breakdown_bytes or {}).items()}
    found = _Figures(dict(traced.figures), breakdown, [*traced.leaves_out, left_out])
    found.drop(*(f"{phase}_peak_live_bytes" for phase in _TIMES_OF_PEAKS))
    _put_weights(found, module, technique, adapts)
    _put_states(found, module, technique)
    _put_cache(found, module, technique)
    parts = {part: found.values[name] for part in PARTS if (name := f"{part}_peak_live_bytes") in found.values}
    return replace(
        traced,
        how="arithmetic",
        figures=found.values,
        breakdown_bytes=found.breakdown or None,
        peak_part=max(parts, key=lambda part: parts[part], default=None),
        leaves_out=tuple(found.leaves_out),
    )


def _put_weights(found: _Figures, module: nn.Module, technique: Technique, adapts: bool) -> None:
    bits, share = technique.nominal_bits(), technique.nominal_share()
    if bits is None and share in (None, 1):
        return
    weights = [each for each in _matrices(module, technique) if not (adapts and each.requires_grad)]
    saved = sum(_saved_bytes(weight, bits, 1.0 if share is None else share) for weight in weights)
    found.leaves_out += [KEPT_AS_THEY_ARE, SCALES]
    if "trained_weights_bytes" in found.values and not adapts:
        found.drop_peaks()
        found.drop(*(f"{name}_bytes" for name in _TRAINING))
        found.leaves_out.append(TRAINED)
    else:
        found.hold_less(saved, "weights")
        found.leaves_out.append(UNPACKED)
    for name in ("weights_bytes", "frozen_weights_bytes", "disk_bytes"):
        if name in found.values:
            found.values[name] -= saved


def _matrices(module: nn.Module, technique: Technique) -> Iterator[nn.Parameter]:
    """Yield the weights that a technique is left: those of matrices but embeddings and the output head, each once."""
    head = output_head(module)
    seen = {id(getattr(layer, "weight", None)) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.ndim != 2 or layer is head or id(weight) in seen:
            continue
        if not isinstance(technique, SelectsLayers) or technique.selects(name):
            seen.add(id(weight))
            yield weight


def _saved_bytes(weight: nn.Parameter, bits: float | None, share: float) -> int:
    before = 8.0 * weight.element_size()
    return round(weight.numel() * (before - share * min(before, before if bits is None else bits)) / 8)


def _put_states(found: _Figures, module: nn.Module, technique: Technique) -> None:
    size, before = technique.nominal_state_bytes(), found.values.get("optimizer_state_bytes")
    if size is None or before is None:
        return
    states = round(size * sum(each.numel() for each in module.parameters() if each.requires_grad))
    found.hold_less(int(before) - states, "optimizer")
    found.drop_part("optimizer")
    found.values["optimizer_state_bytes"] = states
    found.leaves_out.append(STEP_OF_OPTIMIZER)


def _put_cache(found: _Figures, module: nn.Module, technique: Technique) -> None:
    bits, before = technique.nominal_cache_bits(), found.values.get("cache_bytes")
    if bits is None or before is None:
        return
    floating = next(each for each in module.parameters() if each.is_floating_point())
    saved_share = 1 - min(1.0, bits / (8 * floating.element_size()))
    found.values["cache_bytes"] = round(before * (1 - saved_share))
    found.drop("held_live_bytes")
    for part, held in found.breakdown.items():
        saved = round(saved_share * held.get("cache", 0))
        held["cache"] = held.get("cache", 0) - saved
        if (name := f"{part}_peak_live_bytes") in found.values:
            found.values[name] -= saved
    found.peak_of_parts()
    found.leaves_out.append(OF_CACHE)
