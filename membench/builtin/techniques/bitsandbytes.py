"""bitsandbytes' quantized linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from membench.builtin.techniques.quantizer import LayerQuantizer

if TYPE_CHECKING:
    from torch import nn

# Dettmers et al., 2022, and what transformers takes where nothing else is said.
_OUTLIER = 6.0


class _BitsAndBytes(LayerQuantizer):
    imports: ClassVar[tuple[str, ...]] = ("torch", "bitsandbytes")
    needs: ClassVar[Mapping[str, str]] = {"bitsandbytes": "membench[bitsandbytes]"}
    no_embeddings = "bitsandbytes cannot save a quantized embedding"


class BnbInt8(_BitsAndBytes):
    """LLM.int8() (bitsandbytes): linear weights as int8 with a scale a row, inputs rounded to int8 a token.

    s = max|x| / 127 in fp32, of weights cast to fp16. Columns of the input with a value above 6 are computed apart,
    unrounded. Dettmers et al., 2022 (arXiv:2208.07339). ``head`` takes in the output head.
    """

    kind = "int8"

    def nominal_bits(self) -> float | None:
        return 8

    def quantized(self, name: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
        from bitsandbytes.nn import Int8Params, Linear8bitLt  # type: ignore[attr-defined]
        from torch import nn

        assert isinstance(layer, nn.Linear)
        made = Linear8bitLt(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            has_fp16_weights=False,
            threshold=_OUTLIER,
            device="meta",
        )
        # It quantizes what moves away from the CPU, or from there to there, and nothing that is on a GPU already.
        weight: Any = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        made.weight, made.bias = weight.to(layer.weight.device), layer.bias
        return made


class BnbNf4(_BitsAndBytes):
    """Linear weights as 4-bit NormalFloat with a scale a block (bitsandbytes): 16 levels, spaced like a normal law's.

    A block of ``block_size`` neighbours is divided by its largest; these largest are fp32, or with
    ``double_quantization`` 8 bits and an fp32 scale for 256: 4 + 32 / ``block_size`` bits a weight, or 4 + 8.1 /
    ``block_size``. Dettmers et al., 2023 (arXiv:2305.14314). ``head`` takes in the output head. On a CPU with
    AVX512-BF16 the first pass outside training packs the weights anew, with the largest in bf16 (4 + 16 /
    ``block_size`` bits), and computes in bf16; a checkpoint undoes that, and rounds the largest once more.
    """

    imports = ("torch", "bitsandbytes", "membench.builtin.layers.bitsandbytes")
    kind = "NF4"
    block_size: Literal[32, 64, 128, 256, 512, 1024] = 64
    double_quantization: bool = True

    def shares(self) -> tuple[str, int] | None:
        return "block_size", self.block_size

    def nominal_bits(self) -> float | None:
        return 4

    def quantized(self, name: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
        from torch import nn

        from membench.builtin.layers.bitsandbytes import Nf4Linear

        assert isinstance(layer, nn.Linear)
        return Nf4Linear.of(layer, self.block_size, self.double_quantization)
