"""Hugging Face transformers' own classes, from published configurations, with seeded random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn

# width, layers, heads, key-value heads, feed-forward width, vocabulary, longest sequence, tied embeddings
_GPT2 = {
    "82m": (768, 6, 12, 12, 3072, 50257, 1024, True),  # the shape of distilgpt2
    "124m": (768, 12, 12, 12, 3072, 50257, 1024, True),
    "355m": (1024, 24, 16, 16, 4096, 50257, 1024, True),
    "774m": (1280, 36, 20, 20, 5120, 50257, 1024, True),
    "1.5b": (1600, 48, 25, 25, 6400, 50257, 1024, True),
}
_LLAMA = {
    "15m": (288, 6, 6, 6, 768, 32000, 2048, True),  # the shape of stories15M
    "60m": (512, 8, 8, 8, 1376, 32000, 2048, False),  # the shape GaLore trains
    "1b": (2048, 16, 32, 8, 8192, 128256, 131072, True),  # Llama 3.2
    "7b": (4096, 32, 32, 32, 11008, 32000, 4096, False),  # Llama 2
    "13b": (5120, 40, 40, 40, 13824, 32000, 4096, False),
    "70b": (8192, 80, 64, 8, 28672, 32000, 4096, False),
}
_QWEN = {  # Qwen 2.5
    "0.5b": (896, 24, 14, 2, 4864, 151936, 32768, True),
    "1.5b": (1536, 28, 12, 2, 8960, 151936, 32768, True),
    "7b": (3584, 28, 28, 4, 18944, 152064, 32768, False),
}


def _presets(sizes: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {size: {"size": size} for size in sizes}


class _Transformer(Model):
    size: str
    sizes: ClassVar[Mapping[str, tuple[int, int, int, int, int, int, int, bool]]]

    def max_tokens(self) -> int | None:
        return self.sizes[self.size][6]

    def config(self) -> Any:
        """The transformers configuration of this size."""
        raise NotImplementedError

    def skeleton(self) -> nn.Module:
        """The module on the meta device: shapes without memory."""
        import torch

        with torch.device("meta"):
            return self._construct()

    def _construct(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(self.config())

    def needed_bytes(self) -> int | None:
        return sum(parameter.nbytes for parameter in self.skeleton().parameters())

    def build(self, context: Context) -> nn.Module:
        import torch

        torch.manual_seed(context.seed)
        with torch.device(context.device):
            return self._construct()


class Gpt2(_Transformer):
    """GPT-2, random weights, in the sizes OpenAI published (and distilgpt2's)."""

    imports = ("torch", "transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto")
    presets = _presets(_GPT2)
    sizes = _GPT2
    size: Literal["82m", "124m", "355m", "774m", "1.5b"] = Field("124m")

    def config(self) -> Any:
        from transformers import GPT2Config

        width, layers, heads, _, _, vocabulary, longest, _ = self.sizes[self.size]
        return GPT2Config(vocab_size=vocabulary, n_positions=longest, n_embd=width, n_layer=layers, n_head=heads)


class Llama(_Transformer):
    """Llama, random weights, in published shapes from 15 million to 70 billion parameters."""

    imports = ("torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto")
    presets = _presets(_LLAMA)
    sizes = _LLAMA
    size: Literal["15m", "60m", "1b", "7b", "13b", "70b"] = Field("60m")

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**_grouped_query(self.sizes[self.size]))


class Qwen(_Transformer):
    """Qwen 2.5, random weights, in published shapes."""

    imports = ("torch", "transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.modeling_auto")
    presets = _presets(_QWEN)
    sizes = _QWEN
    size: Literal["0.5b", "1.5b", "7b"] = Field("0.5b")

    def config(self) -> Any:
        from transformers import Qwen2Config

        return Qwen2Config(**_grouped_query(self.sizes[self.size]))


def _grouped_query(shape: tuple[int, int, int, int, int, int, int, bool]) -> dict[str, Any]:
    width, layers, heads, key_value_heads, inner, vocabulary, longest, tied = shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": longest,
        "tie_word_embeddings": tied,
    }
