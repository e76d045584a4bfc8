"""Weights as integers or 8-bit floats and scales: the textbook's way, and torchao's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from membench.builtin.techniques.experts import by_expert, go_expert_by_expert
from membench.builtin.techniques.precision import Bf16
from membench.builtin.techniques.quantizer import LayerQuantizer, once
from membench.plugins import Context, Setting, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.builtin.layers.packed import PackedWeight

_DOUBLE_QUANTIZED = 256
_AT_ONCE = 2**16
"""Weights that are converted at once, so that what is made of them meanwhile stays small."""
_NF4_AT_ONCE = 2**14


class RoundToNearest(LayerQuantizer):
    """The textbook: y = round(x / s) · s, integers of 2 to 8 bits packed without gaps, unpacked for each pass.

    s = max|x| / (2^(bits - 1) - 1), of the whole tensor, of each row ("channel") or of each group of ``group_size``
    neighbours in a row. Krishnamoorthi, 2018 (arXiv:1806.08342). Scales have the type that the weights had: in fp32
    |y - x| ≤ s / 2; in bf16, of 8 bits of precision, y is itself rounded and may be 0.65 s off; in fp16 scales below
    6e-5 lose precision.

    ``embeddings`` and ``head`` take in what is else left alone. There is no kernel for packed integers: a layer's
    weight is unpacked whole for each pass, which costs time and, for that moment, memory. Experts that transformers
    keeps stacked in one tensor are packed, too, and run one after the other, each unpacked alone; under adapters,
    autograd keeps those unpacked until the backward pass.
    """

    imports = ("torch", "membench.builtin.layers.packed", "membench.builtin.layers.packed_experts")
    bits: int = Field(8, ge=2, le=8)
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = Field(None, ge=2)

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    def shares(self) -> tuple[str, int] | None:
        return None if self.group_size is None else ("group_size", self.group_size)

    def check(self, setting: Setting) -> str | None:
        if self.granularity == "group" and self.group_size is None:
            return "granularity = 'group' needs a group_size"
        if self.granularity != "group" and self.group_size is not None:
            return f"group_size = {self.group_size} has no meaning with granularity = '{self.granularity}'"
        return super().check(setting)

    def nominal_bits(self) -> float | None:
        return self.bits

    @property
    def _most(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def quantized(self, name: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
        from torch import nn

        from membench.builtin.layers.packed import PackedEmbedding, PackedLinear

        packed = once(layer.weight, lambda: self.packed(layer.weight.data))
        return PackedEmbedding(packed) if isinstance(layer, nn.Embedding) else PackedLinear(packed, layer.bias)

    def converted(self, name: str, layer: nn.Module, head: nn.Module | None, context: Context) -> nn.Module:
        if by_expert(layer):
            return self.convert(name, layer, head) if self.selects(name) else layer
        return super().converted(name, layer, head, context)

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        from membench.builtin.layers.packed_experts import PackedExperts

        stacks = by_expert(layer)
        if not stacks:
            return super().convert(name, layer, head)
        transposed = bool(getattr(layer, "is_transposed", False))
        for key, stack in stacks.items():
            matrices = [matrix.t() if transposed else matrix for matrix in stack.data]
            if self.group_size and (columns := matrices[0].shape[1]) % self.group_size:
                reason = f"group_size = {self.group_size} does not divide the {columns} columns of '{name}.{key}'"
                raise Unsuitable(reason)
            packed = self.packed(*matrices)
            delattr(layer, key)
            setattr(layer, key, PackedExperts(packed, len(matrices), transposed))
        go_expert_by_expert(layer)
        return layer

    def packed(self, *matrices: torch.Tensor) -> PackedWeight:
        """The integers and scales of a weight (rows, columns), or of several of one shape, one below the other.

        Beside these there are never more than some rows. Where a matrix has one scale, each of several has its own.
        """
        import torch

        from membench.builtin.layers.packed import PackedWeight, runs_of_rows

        rows, columns = matrices[0].shape
        groups = columns // self.group_size if self.group_size else 1
        scales: list[torch.Tensor] = []
        runs: list[torch.Tensor] = []
        for matrix in matrices:
            own = runs_of_rows(matrix)
            largest = torch.cat([_largest(run.reshape(len(run), groups, -1)) for run in own]).float()
            if self.granularity == "tensor":
                largest = largest.amax().view(1, 1)
            scales.append((largest / self._most).to(matrix.dtype))
            runs += own
        scale = scales[0] if len(scales) == 1 else torch.cat([each.expand(rows, groups) for each in scales])
        scale[scale == 0] = 1  # what is all zero, or too small for the type
        by_run = scale.expand(rows * len(matrices), groups).split([len(run) for run in runs])
        return PackedWeight(map(self._integers, runs, by_run), (rows * len(matrices), columns), scale, self.bits)

    def _integers(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """int8 of a weight (rows, columns), for its scales (rows, groups)."""
        blocks = weight.float().reshape(*scale.shape, -1) / scale.float()[:, :, None]
        return blocks.round_().clamp_(-self._most, self._most).char().view(weight.shape)


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """max|x| over the last dimension, without a copy of the absolute values."""
    import torch

    return torch.maximum(weight.amax(-1), -weight.amin(-1))


class _Torchao(LayerQuantizer):
    """A layer's weight becomes a tensor of torchao's."""

    imports: ClassVar[tuple[str, ...]] = ("torch", "torchao.quantization")
    weight_only = True
    rows_apart: ClassVar[bool] = True
    """Whether rows of a weight are quantized each by itself: then some are converted at a time."""

    def config(self, weight: torch.Tensor) -> Any:
        """torchao's configuration for a weight.

        Raises:
            Unsuitable: where its kernels do not serve it.
        """
        raise NotImplementedError

    def quantized(self, name: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
        layer.weight = once(layer.weight, lambda: self._converted(name, layer.weight))
        return layer

    def _converted(self, name: str, weight: torch.Tensor) -> nn.Parameter:
        """torchao's tensor for a weight; beside it and the weight there are never more than some rows."""
        from torch import nn

        config = self.config(weight)
        if not self.rows_apart:
            return _by_torchao(name, weight.data, config)
        runs = weight.data.split(max(1, _AT_ONCE // weight.shape[1]))
        first: Any = _by_torchao(name, runs[0], config).data
        inner, kind = first.__tensor_flatten__()
        whole = {key: getattr(first, key).new_empty(len(weight), *getattr(first, key).shape[1:]) for key in inner}
        row = 0
        for run in runs:
            some: Any = first if row == 0 else _by_torchao(name, run, config).data
            for key, tensor in whole.items():
                tensor[row : row + len(run)] = getattr(some, key)
            row += len(run)
        self.mend(whole)
        made = type(first).__tensor_unflatten__(whole, kind, weight.shape, weight.stride())
        return nn.Parameter(made, requires_grad=False)

    def mend(self, inner: dict[str, torch.Tensor]) -> None:
        """Put right, in place, what torchao makes of a weight: its plain tensors by their names."""


def _by_torchao(name: str, weight: torch.Tensor, config: Any) -> nn.Parameter:
    from torch import nn
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, config, filter_fn=lambda *_: True)
    if not hasattr(layer.weight.data, "__tensor_flatten__"):
        raise Unsuitable(f"torchao leaves '{name}' of {tuple(weight.shape)} as it is")
    made = layer.weight
    # torchao hangs a method of its own on the layer: a cycle, which would keep the rows until a collector comes.
    vars(layer).clear()
    return made


class Int8WeightOnly(_Torchao):
    """Linear weights as int8 with a scale a row, or a group (torchao); embeddings and output head are left alone.

    s = max|x| / 127.5, q = round(x / s) from -128 to 127; a scale (fp32) and a zero point (int8, always 0) take five
    bytes a row or group. ``embeddings`` and ``head`` take those in; torchao unpacks the whole table for each look-up.
    Under adapters, autograd keeps each weight as it was unpacked until the backward pass: there it saves nothing then.
    """

    kind = "int8"
    group_size: int | None = Field(None, ge=1)

    def shares(self) -> tuple[str, int] | None:
        return None if self.group_size is None else ("group_size", self.group_size)

    def nominal_bits(self) -> float | None:
        return 8

    def config(self, weight: torch.Tensor) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

        granularity = PerRow() if self.group_size is None else PerGroup(self.group_size)
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)


class Int8Dynamic(_Torchao):
    """Linear weights as int8 with a scale a row, and inputs rounded to int8 a token as they come (torchao).

    The product is one of integers. It saves what int8-weight-only saves, and loses a little more quality for the
    rounded inputs. ``embeddings`` and ``head`` take those in.
    """

    kind = "int8"
    no_gradients = "no gradient passes through inputs rounded to int8"

    def nominal_bits(self) -> float | None:
        return 8

    def config(self, weight: torch.Tensor) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


class Int4WeightOnly(_Torchao):
    """Linear weights as 4-bit integers with a scale and a zero point a group (torchao, tinygemm's layout).

    (max - min) / 15 a group; scale and zero point in bf16 take four bytes a group: 4 + 32 / ``group_size`` bits a
    weight. The kernels compute in bf16, so the stack needs ``bf16`` before. On a CPU it is torchao's prototype, and
    rows must come by 16; a GPU needs capability 8.0, and its layout pads rows to multiples of 1,024 columns.
    """

    imports = ("torch", "torchao.quantization", "torchao.prototype.quantization.int4")
    kind = "int4"
    rows_apart = False  # both kernels' layouts interleave them
    no_embeddings = "torchao cannot look up rows of 4-bit weights"
    no_gradients = "torchao's int4 kernels have no derivative"
    group_size: Literal[32, 64, 128, 256] = 32

    def shares(self) -> tuple[str, int] | None:
        return "group_size", self.group_size

    def check(self, setting: Setting) -> str | None:
        if setting.device == "cpu" and self.group_size == 256:
            return "group_size = 256: on a CPU it is 32, 64 or 128"
        return super().check(setting)

    def refuse(self, setting: Setting) -> str | None:
        if not any(isinstance(technique, Bf16) for technique in setting.before):
            return "int4 kernels compute in bf16 (in fp32 a CPU takes some 40 times as long): put 'bf16' before it"
        return super().refuse(setting)

    def nominal_bits(self) -> float | None:
        return 4

    def config(self, weight: torch.Tensor) -> Any:
        import torch

        if weight.device.type == "cpu":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            if weight.shape[0] % 16:
                raise Unsuitable(f"the CPU's int4 kernel needs rows by 16: a layer has {weight.shape[0]}")
            return PrototypeInt4WeightOnlyConfig(group_size=self.group_size, set_inductor_config=False)
        from torchao.quantization import Int4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        if torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise Unsuitable("int4 kernels need a GPU of capability 8.0 (Ampere) or later")
        # torchao's plain layout asks for a library that PyPI does not have.
        return Int4WeightOnlyConfig(
            group_size=self.group_size,
            int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
            set_inductor_config=False,
        )


class Fp8WeightOnly(_Torchao):
    """Linear weights as 8-bit floats (e4m3) with a scale a row (torchao); computed in the inputs' type.

    s = max|x| / 448. A CPU has no kernel for it: the weight is converted back for each pass, slowly. ``embeddings``
    and ``head`` take those in; torchao converts the whole table for each look-up. Under adapters, autograd keeps each
    weight as it was converted until the backward pass.
    """

    kind = "fp8"

    def nominal_bits(self) -> float | None:
        return 8

    def config(self, weight: torch.Tensor) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig

        return Float8WeightOnlyConfig(set_inductor_config=False)

    def mend(self, inner: dict[str, torch.Tensor]) -> None:
        import torch

        # torchao's scale of a row of zeros is 0, and the row is divided by it.
        empty = inner["scale"] == 0
        inner["scale"][empty] = 1
        inner["qdata"].view(torch.uint8)[empty.squeeze(-1)] = 0


class Fp8Dynamic(_Torchao):
    """Linear weights and, as they come, inputs as 8-bit floats (e4m3) with a scale a tensor (torchao); GPUs only.

    Needs a GPU of capability 8.9 (Ada, Hopper) or later, and layers whose rows and columns come by 16.
    """

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    kind = "fp8"
    rows_apart = False
    no_gradients = "no gradient passes through inputs rounded to fp8"

    def refuse(self, setting: Setting) -> str | None:
        return _NO_FP8 if setting.device == "cpu" else super().refuse(setting)

    def nominal_bits(self) -> float | None:
        return 8

    def config(self, weight: torch.Tensor) -> Any:
        import torch
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

        if torch.cuda.get_device_capability(weight.device) < (8, 9):
            raise Unsuitable(_NO_FP8)
        return Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False)


_NO_FP8 = "products of 8-bit floats need a GPU of capability 8.9 (Ada, Hopper) or later"


class Nf4(LayerQuantizer):
    """Linear weights as 4-bit NormalFloat, double quantized (torchao): 16 levels where a normal distribution's mass is.

    Each block of ``block_size`` weights is divided by its largest; these largest are kept as int8, with a scale for
    256 of them, or for the largest power of two below that divides their number. Dettmers et al., 2023
    (arXiv:2305.14314). About 4 + 8 / ``block_size`` bits a weight. It is unpacked for each pass, slowly on a CPU.
    torchao takes some 130 bytes a weight to find the nearest levels of a million at once; here it takes 16,384 at once.
    """

    imports = ("torch", "torchao.quantization")
    kind = "NF4"
    weight_only = True
    no_embeddings = "torchao cannot look up rows of NF4 weights"
    block_size: int = Field(64, ge=2)

    def check(self, setting: Setting) -> str | None:
        shape = setting.model.shape
        if (wrong := super().check(setting)) or shape is None:
            return wrong
        key_value_width = shape.width // shape.heads * shape.key_value_heads
        for rows in (shape.width, key_value_width, shape.inner_width, *([shape.vocabulary] if self.head else [])):
            if rows * shape.width % self.block_size:
                return f"block_size = {self.block_size} does not divide a layer of {rows} × {shape.width} weights"
        return None

    def nominal_bits(self) -> float | None:
        return 4

    def for_rehearsal(self, context: Context) -> Self:
        return self.model_copy(update={"block_size": 64}) if context.rehearsal else self

    def quantized(self, name: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
        from torch import nn
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

        weight = layer.weight
        if weight.numel() % self.block_size:
            raise Unsuitable(f"block_size = {self.block_size} does not divide the {weight.numel()} weights of '{name}'")
        scales_share = math.gcd(weight.numel() // self.block_size, _DOUBLE_QUANTIZED)
        nf4_tensor.CHUNK_SIZE = _NF4_AT_ONCE
        converted = nf4_tensor.to_nf4(weight.data, self.block_size, scales_share)
        layer.weight = nn.Parameter(converted, requires_grad=False)
        return layer
