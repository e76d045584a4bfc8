"""Mean cross entropy, some tokens at a time, as autograd functions of our own.

N tokens, H the model's width, V its vocabulary. Sums are in fp32, or in the type of the tensors where that is finer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

NOTHING = -100
"""The target of a token that predicts nothing (torch's own ignore_index)."""


def chunked(logits: torch.Tensor, targets: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """The loss of logits (N, V) that are there whole; keeps them alone for the backward pass.

    Args:
        targets: (N,), int64; ``NOTHING`` where there is none.
        chunk_tokens: so many rows are turned into fp32 at once.
    """
    return _functions().chunked.apply(logits, targets, chunk_tokens)


def fused(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """The loss of the logits ``hidden @ weight.T + bias``, which are never whole.

    Gradients are computed with the loss, chunk by chunk, for what wants one. They can be asked for once.

    Args:
        hidden: (N, H).
        weight: (V, H); bias: (V,).
        targets: (N,), int64; each token has one.
        chunk_tokens: so many rows have logits at once.
    """
    return _functions().fused.apply(hidden, weight, bias, targets, chunk_tokens)


class _Functions(NamedTuple):
    chunked: Any
    fused: Any


@functools.cache
def _functions() -> _Functions:
    """Made when first asked for: their base class is torch's."""
    import torch
    from torch.autograd.function import once_differentiable

    def precise(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
            ctx.save_for_backward(logits, targets)
            ctx.chunk_tokens = chunk_tokens
            total = torch.zeros((), dtype=precise(logits.dtype), device=logits.device)
            for rows, of in zip(logits.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
                losses = _become_softmax(rows.to(total.dtype, copy=True), of)
                total += losses.where(of != NOTHING, 0).sum()
            return total / (targets != NOTHING).sum()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            logits, targets = ctx.saved_tensors
            counts = (targets != NOTHING)[:, None]
            scale = counts * (gradients[0] / counts.sum())
            gradient = torch.empty_like(logits)
            pieces = (tensor.split(ctx.chunk_tokens) for tensor in (logits, targets, scale, gradient))
            for rows, of, times, into in zip(*pieces, strict=True):
                softmax = rows.to(precise(rows.dtype), copy=True)
                _become_softmax(softmax, of)
                _become_gradient(softmax, of)
                into.copy_(softmax.mul_(times))
                del softmax
            return gradient, None, None

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            chunk_tokens: int,
        ) -> torch.Tensor:
            device = hidden.device.type
            cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
            summed = precise(weight.dtype)
            wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
            of_hidden = torch.empty_like(hidden) if wants_hidden else None
            of_weight = torch.zeros_like(weight, dtype=summed) if wants_weight else None
            of_bias = torch.zeros_like(bias, dtype=summed) if bias is not None and wants_bias else None
            total = torch.zeros((), dtype=summed, device=hidden.device)
            with torch.autocast(device, enabled=False):
                head, offset = weight.to(cast), None if bias is None else bias.to(cast)
                for start in range(0, len(hidden), chunk_tokens):
                    rows = slice(start, start + chunk_tokens)
                    taken = hidden[rows].to(cast)
                    logits = torch.nn.functional.linear(taken, head, offset).to(summed)
                    total += _become_softmax(logits, targets[rows]).sum()
                    # Not divided by the count yet: in fp16 small entries would be lost, which a loss scale, applied
                    # in the backward pass, could not bring back.
                    _become_gradient(logits, targets[rows])
                    if of_bias is not None:
                        of_bias += logits.sum(0)
                    of_logits = logits.to(cast)
                    del logits
                    if of_hidden is not None:
                        of_hidden[rows] = of_logits @ head
                    if of_weight is not None and cast == summed:
                        of_weight.addmm_(of_logits.t(), taken)
                    elif of_weight is not None:
                        of_weight += of_logits.t() @ taken
                    del of_logits  # before the next chunk's logits are there
            # Through save_for_backward, so that whoever counts or moves what is kept for the backward pass sees it.
            ctx.save_for_backward(of_hidden, of_weight, of_bias)
            ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
            ctx.count = len(targets)
            return total / ctx.count

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            scale = gradients[0] / ctx.count
            scaled = []
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
                # In fp32 also where half precision is kept: a scale of 8 bits would be off in every entry alike.
                scaled.append(None if kept is None else kept.to(precise(kept.dtype)).mul_(scale).to(dtype))
            return (*scaled, None, None)

    return _Functions(Chunked, Fused)


def _become_softmax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Overwrite logits (n, V) with their softmax; the losses (n,) of the targets, of no meaning where there is none."""
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    sums = logits.exp_().sum(-1)
    logits /= sums[:, None]
    return sums.log() - chosen


def _become_gradient(softmax: torch.Tensor, targets: torch.Tensor) -> None:
    """Overwrite softmax (n, V) with the gradient of the summed losses for the logits."""
    where = targets.clamp(min=0)[:, None]
    softmax.scatter_add_(1, where, softmax.new_full((1, 1), -1.0).expand_as(where))
