"""How much a part of a model matters: by its weights' size, by a first-order estimate, by what a block changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from membench.builtin.techniques.inner_training import windows
from membench.builtin.techniques.pruning import is_transposed, plain_weight
from membench.builtin.workloads.train import token_loss

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.plugins import Context

_PIECES, _ROWS = 32, 2


@dataclass(frozen=True)
class Slice:
    """One side of a linear layer, in groups that stay or go as a whole.

    Attributes:
        of_inputs: the side: the layer's inputs, or else its outputs, whose biases go with them.
        groups: (groups, indices of a group) into that side.
    """

    layer: nn.Module
    of_inputs: bool
    groups: torch.Tensor

    @property
    def axis(self) -> int:
        """The axis of the weight that this side is."""
        return int(self.of_inputs != is_transposed(self.layer))

    def parameters(self) -> Iterator[tuple[torch.Tensor, int]]:
        """What is cut, each with the axis to cut it along."""
        yield plain_weight(self.layer), self.axis
        bias = self.layer.bias
        if not self.of_inputs and bias is not None:
            yield bias, 0  # type: ignore[misc]

    def summed(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Of values, one for each number of a parameter, the sums by group: (groups,), fp32."""
        import torch

        other = [dimension for dimension in range(values.ndim) if dimension != axis]
        by_index = values.sum(other, dtype=torch.float32) if other else values.float()
        return by_index[self.groups.to(by_index.device)].sum(1)


Part = Sequence[Slice]
"""Slices in as many groups, which are cut together: channels of a feed-forward layer, heads of an attention layer."""


def magnitudes(part: Part) -> torch.Tensor:
    """The Euclidean norm of each group's parameters: (groups,)."""
    squares = [side.summed(p.detach().float().square(), axis) for side in part for p, axis in side.parameters()]
    return sum(squares[1:], squares[0]).sqrt()


def taylor(parts: Sequence[Part], module: nn.Module, context: Context) -> list[torch.Tensor]:
    """Σ |w·∂L/∂w| over each group's parameters, mean over pieces of calibration text: (groups,) for each part.

    What the loss would change by to first order, if each of the group's parameters became zero, taken without signs
    (Molchanov et al., 2019, arXiv:1906.10771). Only the parameters that are scored want gradients meanwhile, and each
    gradient goes when it is scored, so that one is alive at a time.
    """
    import torch

    scores: list[Any] = [torch.zeros(len(part[0].groups), device=context.device) for part in parts]
    handles = []

    def listen(score: torch.Tensor, side: Slice, parameter: torch.Tensor, axis: int) -> None:
        def hear(tensor: torch.Tensor) -> None:
            assert tensor.grad is not None
            score.add_(side.summed((tensor.detach() * tensor.grad).abs(), axis))
            tensor.grad = None

        handles.append(parameter.register_post_accumulate_grad_hook(hear))

    with at_rest(module):
        for part, score in zip(parts, scores, strict=True):
            for side in part:
                for parameter, axis in side.parameters():
                    parameter.requires_grad_(True)
                    listen(score, side, parameter, axis)
        count = 0
        for piece in _calibration(module, context):
            token_loss(module, piece).backward()
            count += 1
        for handle in handles:
            handle.remove()
    return [score / count for score in scores]


def influences(blocks: Sequence[nn.Module], body: nn.Module, context: Context) -> list[float]:
    """What each block changes: 1 − cos(its input, its output), mean over the tokens of calibration text.

    Block influence of Men et al., 2024 (ShortGPT, arXiv:2403.03853).

    Args:
        body: the model without its output head, which has no part in it.
    """
    import torch

    similar = [0.0] * len(blocks)
    tokens = 0

    def listen(position: int) -> Any:
        def hear(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any], found: Any) -> None:
            before, after = first_tensor((*given, *named.values())).float(), first_tensor(found).float()
            similar[position] += torch.cosine_similarity(before, after, dim=-1).sum().item()

        return hear

    handles = [block.register_forward_hook(listen(position), with_kwargs=True) for position, block in enumerate(blocks)]
    with at_rest(body), torch.no_grad():
        for piece in _calibration(body, context):
            run(body, piece)
            tokens += piece.numel()
    for handle in handles:
        handle.remove()
    return [1 - cosine / tokens for cosine in similar]


def _calibration(module: nn.Module, context: Context) -> Iterator[torch.Tensor]:
    """Pieces of the training text, small ones: the logits of whole batches would make the peak."""
    pieces = (piece for batch in windows(module, context, context.seed) for piece in batch.split(_ROWS))
    return itertools.islice(pieces, 1 if context.rehearsal else _PIECES)


def run(body: nn.Module, ids: torch.Tensor) -> None:
    """Run a model without its head on token ids; where a decoder lies beside an encoder, both read them."""
    if getattr(getattr(body, "config", None), "is_encoder_decoder", False):
        body(ids, decoder_input_ids=ids)
    else:
        body(ids)


def first_tensor(held: Any) -> torch.Tensor:
    """What passes through a layer, of what it is given or gives: its first tensor."""
    import torch

    return held if isinstance(held, torch.Tensor) else next(each for each in held if isinstance(each, torch.Tensor))


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Without dropout and with no parameter that wants gradients; as it was before, afterwards."""
    was_training = module.training
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.eval()
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        module.train(was_training)
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
