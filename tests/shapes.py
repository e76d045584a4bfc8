"""Models of known shape for the tests, made by the model plug-in 'factory' or one that saves each case an import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from membench.builtin.models.factory import Factory

if TYPE_CHECKING:
    from torch import nn

WIDTH, HEADS, LAYERS, VOCABULARY = 128, 8, 4, 8192


class FactoryOfTransformers(Factory):
    """A function that makes a model of transformers, which is imported before any case. Registered by the tests."""

    imports = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2")


def _gpt2(dropout: float) -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=512, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=dropout, attn_pdrop=dropout, embd_pdrop=dropout, bos_token_id=None, eos_token_id=None,
        # GPT-2's own GELU is written as eight operations and keeps four tensors; as one kernel it keeps its input,
        # which is what is published.
        activation_function="gelu_pytorch_tanh", attn_implementation="eager",
    )  # fmt: skip
    module: nn.Module = AutoModelForCausalLM.from_config(config)
    return module


def gpt2_with_dropout() -> nn.Module:
    """Layers of GPT-2, with dropout as published and attention written out."""
    return _gpt2(0.1)


def gpt2_without_dropout() -> nn.Module:
    """Layers of GPT-2, without dropout, attention written out."""
    return _gpt2(0.0)
