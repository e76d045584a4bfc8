"""Cross entropy that does not hold the logits several times over.

N tokens to predict, H the model's width, V its vocabulary. A plain step holds N·V logits, their copy in fp32 and its
log-softmax, and as much again while it goes backward: at V = 128,000 more than all layers together.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.builtin.techniques import cross_entropy
from membench.builtin.techniques.activations import OffloadActivations
from membench.builtin.workloads.train import predicts_masked_tokens
from membench.plugins import Context, Setting, Technique, TrainingStep, Unsuitable, logits_of, output_head
from membench.plugins.replacing import reason_to_keep
from membench.worker.evaluating import evaluating

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Loss(Technique):
    acts_on: ClassVar[str] = "activations"
    chunk_tokens: int = Field(128, ge=1)

    def refuse(self, setting: Setting) -> str | None:
        if not setting.workload.trains:
            return "it is another way to the loss, and this workload has no loss"
        if any(isinstance(technique, _Loss) for technique in setting.before):
            return "a training step has one loss, and the stack names two"
        if any(isinstance(technique, OffloadActivations) for technique in setting.before):
            return "it would replace the loss whose activations 'offload-activations' moves: put that after the loss"
        return None


class ChunkedCrossEntropy(_Loss):
    """Logits whole, in the model's own type; their fp32 copy, softmax and loss only for some tokens at a time.

    The logits alone are kept for the backward pass, which computes each chunk's softmax again: N·V·w bytes forward and
    2·N·V·w backward, for logits of w bytes each, and chunk_tokens·V·4 for the chunk.

    Source: torchtune's CEWithChunkedOutputLoss, with checkpointed chunks. Limits: logits and their gradient stay whole.
    """

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        return dataclasses.replace(step, loss=self._loss)

    def _loss(self, module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        import torch

        if predicts_masked_tokens(type(module)):
            raise Unsuitable(f"it is a loss of next tokens, and a {type(module).__name__} predicts masked ones")
        logits = logits_of(module(batch), batch)
        # The last token's logits predict nothing. To cut them off would copy all the others.
        targets = torch.nn.functional.pad(batch[:, 1:], (0, 1), value=cross_entropy.NOTHING)
        return cross_entropy.chunked(logits.flatten(0, 1), targets.flatten(), self.chunk_tokens)


class FusedLinearCrossEntropy(_Loss):
    """Output head and loss as one, for some tokens at a time: neither logits nor their gradient are ever whole.

    While a chunk's logits are there, the gradients of the head's input (N·H) and of its weight (V·H, in fp32) are
    computed from them and wait for the backward pass, so that nothing is computed twice. chunk_tokens·V·4 bytes and
    what a product of a chunk takes come on top; a frozen head takes no gradient.

    Source: the method of Liger Kernel (Hsu et al. 2024), written for any device in plain torch. Limits: the head must
    be a plain linear layer, and nothing may happen to the logits after it, which is looked at once; the gradient of its
    weight is there from the forward pass on, and counts as activations until the backward pass.
    """

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        return dataclasses.replace(step, loss=_FusedLoss(self.chunk_tokens))


class _FusedLoss:
    """The loss of (module, token ids); takes the module apart at its first call."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._parts: tuple[nn.Module, nn.Linear] | None = None

    def __call__(self, module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if self._parts is None:
            self._parts = decoder_and_head(module, batch[:1, :2])
        decoder, head = self._parts
        hidden = decoder(batch)[0][:, :-1].flatten(0, 1)
        return cross_entropy.fused(hidden, head.weight, head.bias, batch[:, 1:].flatten(), self._chunk_tokens)


def decoder_and_head(module: nn.Module, ids: torch.Tensor) -> tuple[nn.Module, nn.Linear]:
    """What of a transformers model makes hidden states (B, T, H), and the linear layer that makes logits of them.

    Args:
        ids: a few token ids (B, T) to try on them.

    Raises:
        plugins.Unsuitable: if the model cannot be taken apart so.
    """
    from torch import nn

    causal = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    decoder, head = getattr(causal, "base_model", causal), output_head(causal)
    if decoder is causal or head is None:
        raise Unsuitable("the model does not say what its decoder and its output head are")
    if type(head) is not nn.Linear or hasattr(head.weight.data, "__tensor_flatten__"):
        kind = type(head.weight.data if type(head) is nn.Linear else head)
        whose = kind.__module__.partition(".")[0]
        raise Unsuitable(
            f"the output head is a {kind.__name__} of {whose}: only a plain linear layer can be fused with the loss"
        )
    if not _make_the_logits(module, decoder, head, ids):
        raise Unsuitable(f"{type(causal).__name__} does more to its logits than its output head")
    if (reason := reason_to_keep(head, None) or reason_to_keep(causal, None)) is not None:
        raise Unsuitable(f"the output head cannot be fused with the loss: of it or the model, {reason}")
    return decoder, head


def _make_the_logits(module: nn.Module, decoder: nn.Module, head: nn.Linear, ids: torch.Tensor) -> bool:
    """Whether the module's logits are what the head makes of the decoder's output.

    Seen on output 100 times as loud, as caps on logits show only where they are large.
    """
    import torch

    def amplify(layer: nn.Module, given: Any, output: Any) -> None:
        output[0].mul_(100)

    hook = decoder.register_forward_hook(amplify)
    with evaluating(module), torch.compiler.set_stance("force_eager"):
        made, expected = head(decoder(ids)[0]), logits_of(module(ids), ids)
    hook.remove()
    return expected.shape == made.shape and torch.allclose(expected, made, rtol=1e-2, atol=1e-2)
