"""Which code computes attention: torch's fused kernel, or matrix products that write the scores out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from membench.plugins import Context, Technique, Unsuitable

if TYPE_CHECKING:
    from torch import nn


class _Attention(Technique):
    """Switches transformers' attention; heads (a), tokens (s), batch (b)."""

    acts_on: ClassVar[str] = "activations"
    implementation: ClassVar[str]

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        if not hasattr(module, "set_attn_implementation"):
            raise Unsuitable("the model is none of transformers': its attention cannot be exchanged")
        try:
            module.set_attn_implementation(self.implementation)  # type: ignore[operator]
        except (ImportError, ValueError) as error:
            raise Unsuitable(f"{type(module).__name__} does not take it: {error}".partition("\n")[0]) from None
        # A class that cannot change it says so in a log and goes on.
        if module.config._attn_implementation != self.implementation:  # type: ignore[union-attr]
            raise Unsuitable(f"{type(module).__name__} cannot exchange its attention")
        return module


class Sdpa(_Attention):
    """Attention by torch's scaled_dot_product_attention: scores are never written out whole where a kernel is fused.

    What autograd keeps of the softmax and its dropout (2 to 6·a·s²·b bytes a layer in 16-bit, see ``eager-attention``)
    is gone: the kernel keeps one logarithm a row and computes the scores again in the backward pass (Dao et al. 2022,
    FlashAttention).

    Limits: transformers uses it where it can without being asked, so that it changes nothing there, and the record says
    so. With a mask of its own, or dropout on a CPU, torch falls back to kernels that write the scores.
    """

    implementation: ClassVar[str] = "sdpa"


class EagerAttention(_Attention):
    """Attention written out: scores and their softmax are kept for the backward pass. Costs memory, to compare with.

    Bytes a layer beside what ``sdpa`` keeps, in units of a·s²·b. GPT-2 takes the softmax in the scores' own type: 2 in
    16-bit, 4 in fp32. Llama and Qwen take it in fp32 whatever the model is in, and keep it and the 16-bit copy that
    meets the values: 6 in 16-bit, 4 in fp32, where there is no copy. Dropout of scores, which GPT-2 has, keeps its
    mask (1 on a GPU) and its output (2 in 16-bit) on top, so that GPT-2 comes to the 5 of Korthikanti et al. 2022,
    Reducing Activation Recomputation.
    """

    implementation: ClassVar[str] = "eager"
