"""Hugging Face transformers' own classes, from published configurations, with seeded random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from membench.plugins import Context, Model, Shape

if TYPE_CHECKING:
    from torch import nn


_GPT2 = {
    "82m": Shape(768, 6, 12, 12, 3072, 50257, 1024, True),  # the shape of distilgpt2
    "124m": Shape(768, 12, 12, 12, 3072, 50257, 1024, True),
    "355m": Shape(1024, 24, 16, 16, 4096, 50257, 1024, True),
    "774m": Shape(1280, 36, 20, 20, 5120, 50257, 1024, True),
    "1.5b": Shape(1600, 48, 25, 25, 6400, 50257, 1024, True),
}
_LLAMA = {
    "15m": Shape(288, 6, 6, 6, 768, 32000, 2048, True),  # the shape of stories15M
    "60m": Shape(512, 8, 8, 8, 1376, 32000, 2048, False),  # the shape GaLore trains
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, 131072, True),  # Llama 3.2
    "7b": Shape(4096, 32, 32, 32, 11008, 32000, 4096, False),  # Llama 2
    "13b": Shape(5120, 40, 40, 40, 13824, 32000, 4096, False),
    "70b": Shape(8192, 80, 64, 8, 28672, 32000, 4096, False),
}
_QWEN = {  # Qwen 2.5
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936, 32768, True),
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936, 32768, True),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, 32768, False),
}


def _presets(sizes: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {size: {"size": size} for size in sizes}


class _Transformer(Model):
    size: str
    sizes: ClassVar[Mapping[str, Shape]]
    _shape: Shape | None = PrivateAttr(None)

    @classmethod
    def of_shape(cls, shape: Shape) -> Self:
        """A model of this family in a shape that no preset has."""
        made = cls.model_validate({})
        made._shape = shape
        return made

    @property
    def shape(self) -> Shape:
        return self._shape or self.sizes[self.size]

    def miniature(self) -> Model:
        return self.of_shape(self.shape._replace(width=64, layers=1, heads=2, key_value_heads=2, inner_width=192,
                                                 vocabulary=512))  # fmt: skip

    def depth(self) -> int:
        return self.shape.layers

    def with_depth(self, layers: int) -> Model:
        return self.of_shape(self.shape._replace(layers=layers))

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

        shape = self.shape
        return GPT2Config(vocab_size=shape.vocabulary, n_positions=shape.longest, n_embd=shape.width,
                          n_layer=shape.layers, n_head=shape.heads, n_inner=shape.inner_width)  # fmt: skip


class Llama(_Transformer):
    """Llama, random weights, in published shapes from 15 million to 70 billion parameters."""

    imports = ("torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto")
    presets = _presets(_LLAMA)
    sizes = _LLAMA
    size: Literal["15m", "60m", "1b", "7b", "13b", "70b"] = Field("60m")

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**_grouped_query(self.shape))


class Qwen(_Transformer):
    """Qwen 2.5, random weights, in published shapes."""

    imports = ("torch", "transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.modeling_auto")
    presets = _presets(_QWEN)
    sizes = _QWEN
    size: Literal["0.5b", "1.5b", "7b"] = Field("0.5b")

    def config(self) -> Any:
        from transformers import Qwen2Config

        return Qwen2Config(**_grouped_query(self.shape))


def _grouped_query(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "max_position_embeddings": shape.longest,
        "tie_word_embeddings": shape.tied,
    }
