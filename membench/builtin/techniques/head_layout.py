"""Where the heads of an attention lie in its projections, what ties them to their places, and how many are stated."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from membench.builtin.techniques import decoder_config
from membench.builtin.techniques.cut_check import Probe, without_outputs
from membench.builtin.techniques.projections import Attention, Layout
from membench.plugins import Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn


def found_by_silencing(probe: Probe, attention: Attention) -> Layout:
    """How a fused projection is laid out: as it is if without one head's values nothing comes from that head alone.

    Raises:
        Unsuitable: if it is in neither of the known ways.
    """
    if len(attention.into) == 3:
        return "by kind"
    heard: list[torch.Tensor] = []

    def hear(layer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        heard.append(given[0].detach())

    layouts: tuple[Layout, ...] = get_args(Layout)
    for layout in layouts:
        silent = without_outputs(attention.into[0], attention.values(layout))
        probe.run([], [silent, attention.output.register_forward_pre_hook(hear)])
        by_head = heard.pop().reshape(-1, attention.key_value_heads, attention.heads // attention.key_value_heads
                                      * attention.size).abs().amax((0, 2))  # fmt: skip
        if not by_head[0] and bool(by_head[1:].all()):
            return layout
    kind = type(attention.holder).__name__
    raise Unsuitable(f"how a {kind} lays out queries, keys and values in one projection is not known")


def is_biased_by_head(attention: Attention, config: Any) -> bool:
    """Whether positions are biased head by head (relative positions, ALiBi), so that heads are not exchangeable."""
    arguments = inspect.signature(attention.holder.forward).parameters
    return "position_bias" in arguments or ("alibi" in arguments and getattr(config, "alibi", True))


def describe_heads(config: Any, attentions: Sequence[Attention], count: int, left_whole: Sequence[str]) -> None:
    """State in the configuration how many key-value heads are left, if all layers are alike."""
    if len({(each.heads, each.key_value_heads, each.size) for each in attentions}) > 1:
        return
    whole = attentions[0]
    shared = whole.heads // whole.key_value_heads
    decoder_config.describe_heads(
        config, (whole.heads, whole.key_value_heads), (count * shared, count), whole.size, left_whole
    )
