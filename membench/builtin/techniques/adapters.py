"""Small matrices trained beside frozen weights."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from membench.builtin.techniques.bitsandbytes import BnbNf4
from membench.builtin.techniques.experts import remark_on_left
from membench.builtin.techniques.projections import ATTENTION, FEED_FORWARD
from membench.builtin.techniques.pruning import is_linear, is_transposed
from membench.plugins import Context, LayerWise, NotInModel, Setting, Unsuitable
from membench.plugins.replacing import LeftAlone, numberless, use_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_PROJECTIONS = tuple(dict.fromkeys((*ATTENTION, *FEED_FORWARD)))
_MOST_NAMES = 12
_AT_THE_TOP = "at the top of the model; name it in targets to adapt it"


class Lora(LayerWise):
    """Weights frozen, and beside each projection two small matrices of a low rank that are trained (peft).

    y = W·x + α/r · B·A·x, with A (r, inputs) drawn and B (outputs, r) zero, so that nothing is changed at the start:
    r · (inputs + outputs) trained parameters a projection. Gradients and optimizer states (AdamW: 8 bytes a parameter)
    are there for these alone. Of activations A·x comes on top, and with ``dropout`` each projection keeps a dropped-out
    copy of x and its mask; what norms and output head kept for the gradients of their weights is gone, so that without
    dropout there is a little less than in full training. Hu et al., 2021 (arXiv:2106.09685).

    Adapters are in fp32 whatever the weights are in. Quantized weights may lie beneath ('int8-weight-only+lora'), if a
    gradient passes through them. ``targets`` are last parts of layers' names; by default the projections of attention
    and of the feed-forward network, as transformers' families call them.

    Limits: a checkpoint holds the frozen weights too, where a user would keep the adapters alone; adapters stay beside
    the weights and are not merged into them. torchao's int8 and fp8 weights are kept unpacked from the forward to the
    backward pass, so that they save nothing at the peak of training; 4-bit ones and packed integers are not.
    """

    imports: ClassVar[tuple[str, ...]] = ("torch", "peft.tuners.lora")
    acts_on: ClassVar[str] = "gradients, optimizer"
    needs: ClassVar[Mapping[str, str]] = {"peft": "membench[adapters]"}
    trains_adapters: ClassVar[bool] = True
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(_PROJECTIONS, min_length=1)

    def check(self, setting: Setting) -> str | None:
        shape = setting.model.shape
        if shape and self.rank > shape.width:
            return f"rank = {self.rank} is more than the model's width {shape.width}: no low rank"
        return None

    def refuse(self, setting: Setting) -> str | None:
        if any(technique.trains_adapters for technique in setting.before):
            return "there are adapters already"
        return None

    def converted(self, name: str, layer: nn.Module, head: nn.Module | None, context: Context) -> nn.Module:
        """Freeze the layer, whatever the options leave out, and return it or what adapts it.

        peft's layer calls the one that it adapts, so that this keeps its own forward and hooks. Who reads the weight
        itself passes by the adapter.
        """
        _freeze(layer)
        if not self._names(name) or not self.selects(name) or (self._by_default and layer is head):
            return layer
        if (reason := self._reason_to_keep(name, layer, context)) is not None:
            context.left_alone.append(LeftAlone(self, name, reason))
            return layer
        return self.convert(name, layer, head)

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        _freeze(layer)
        return self._adapted(name, layer)

    @property
    def _by_default(self) -> bool:
        return self.targets == _PROJECTIONS

    def _names(self, name: str) -> bool:
        return name.rpartition(".")[2] in self.targets

    def _reason_to_keep(self, name: str, layer: nn.Module, context: Context) -> str | None:
        """Why a layer of a target's name has no adapter; ``None`` if it has one."""
        if self._is_at_the_top(name):
            return _AT_THE_TOP
        if not _is_product(layer):
            return f"it is a {type(layer).__name__}, no linear layer"
        use = use_of(name, context.weight_uses)
        return f"its weight is read by {use.computed_by}" if use is not None and use.computed_by else None

    def _is_at_the_top(self, name: str) -> bool:
        """Whether only the standard names fit a layer, and it lies at the top of the model: it is part of no block."""
        return self._by_default and "." not in name

    def check_patterns(self, names: Iterable[str], context: Context) -> None:
        known = list(names)
        super().check_patterns(known, context)
        named = [name for name in known if self._names(name)]
        if context.rehearsal or any(not self._is_at_the_top(name) for name in named):
            return
        if named:
            raise Unsuitable(f"no layer is adapted: {', '.join(named[:_MOST_NAMES])} ({_AT_THE_TOP})")
        lasts = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
        names = ", ".join(lasts[:_MOST_NAMES])
        targets = ", ".join(self.targets[:_MOST_NAMES]) + (", …" if len(self.targets) > _MOST_NAMES else "")
        refused = Unsuitable if self._by_default else NotInModel
        raise refused(f"no layer has a name of targets = [{targets}]; there are {names}")

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        first = len(context.left_alone)
        module = super().apply(module, context)
        left = context.left_alone[first:]
        if left and not context.rehearsal and not _adapted_layers(module):
            reasons = {f"{numberless(layer.path)} ({layer.reason})": None for layer in left}
            raise Unsuitable(f"no layer is adapted: {', '.join(list(reasons)[:_MOST_NAMES])}")
        return module

    def for_rehearsal(self, context: Context) -> Self:
        """Adapt the linear layers of a miniature that has none of the targets' names."""
        if not context.rehearsal:
            return self
        names = [
            name.rpartition(".")[2] for name, layer in context.model.skeleton().named_modules() if is_linear(layer)
        ]
        return self if set(names) & set(self.targets) else self.model_copy(update={"targets": tuple(names)})

    def _adapted(self, name: str, layer: nn.Module) -> nn.Module:
        import torch
        from peft import LoraConfig, inject_adapter_in_model
        from torch import nn

        holder: Any = nn.ModuleDict({"layer": layer})
        device = _device(layer)
        holder.hf_device_map = {"": device}  # peft asks the parameters, which a layer of packed weights has not
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a factor as any other
            lora_dropout=self.dropout,
            target_modules=["layer"],
            fan_in_fan_out=is_transposed(layer),
        )
        with warnings.catch_warnings():
            # torchao's layers cannot be merged with their adapters, which nobody is about to do.
            warnings.filterwarnings("ignore", message=".*was instantiated without `get_apply_tensor_subclass`")
            try:
                inject_adapter_in_model(config, holder)
            except (ValueError, TypeError) as error:
                kind = type(layer).__name__
                raise Unsuitable(f"peft has no adapters for '{name}', a {kind}: {str(error)[:100]}") from None
        for parameter in holder.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device, torch.float32)
        return holder["layer"]

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        """Leave it as it is, but look whether a gradient passes through what lies beneath the adapters.

        Raises:
            Unsuitable: if none does: rounded inputs have none, and all layers below would learn nothing, unnoticed.
        """
        told: set[tuple[type, type]] = set()
        for _, layer in _adapted_layers(module):
            base = layer.get_base_layer()
            weight = getattr(base, "weight", None)
            if hasattr(weight, "device_mesh"):
                continue  # only plain weights are split over ranks, and it is not there whole outside of a step
            kind = layer_type, weight_type = type(base), type(weight if weight is None else weight.data)
            passes = None if kind in told else _passes_gradients(layer)
            if passes is not None:
                told.add(kind)
            if passes is False:
                raise Unsuitable(
                    f"no gradient passes through a {layer_type.__name__} with a {weight_type.__name__} as its weight: "
                    "adapters of layers below it would not learn"
                )
        return optimizer

    def remark(self, module: nn.Module, context: Context) -> str | None:
        adapted = {name.rpartition(".")[2] for name, _ in _adapted_layers(module)}
        said = {left.path.rpartition(".")[2] for left in context.left_alone if left.technique is self}
        missing = [target for target in self.targets if target not in adapted | said]
        if not missing or (adapted and self.targets == _PROJECTIONS):
            return None
        return f"no layer is named {', '.join(missing)}: there are no adapters for it"


class QLora(Lora):
    """Weights as 4-bit NormalFloat, frozen, with adapters beside the projections (bitsandbytes and peft).

    'bnb-nf4+lora' as one: 4 + 8.1 / ``block_size`` bits a weight of every linear layer but the output head, double
    quantization included, and ``lora`` on top. A layer's weight is unpacked for each pass, forward and backward.
    Dettmers et al., 2023 (arXiv:2305.14314).

    Limits: the paper's paged optimizer states, which a GPU can do without when short of memory, are not part of it.
    """

    imports: ClassVar[tuple[str, ...]] = (*Lora.imports, *BnbNf4.imports)
    acts_on: ClassVar[str] = "weights, gradients, optimizer"
    needs: ClassVar[Mapping[str, str]] = {**Lora.needs, **BnbNf4.needs}
    block_size: Literal[32, 64, 128, 256, 512, 1024] = 64

    @property
    def base(self) -> BnbNf4:
        """What quantizes the frozen weights."""
        return BnbNf4(block_size=self.block_size, skip=self.skip, only=self.only)

    def check(self, setting: Setting) -> str | None:
        return super().check(setting) or self.base.check(setting)

    def refuse(self, setting: Setting) -> str | None:
        return super().refuse(setting) or self.base.refuse(dataclasses.replace(setting, after=(self, *setting.after)))

    def for_rehearsal(self, context: Context) -> Self:
        fitting, block_size = super().for_rehearsal(context), self.base.for_rehearsal(context).block_size
        return fitting.model_copy(update={"block_size": block_size}) if context.rehearsal else fitting

    def nominal_bits(self) -> float | None:
        return self.base.nominal_bits()

    def remark(self, module: nn.Module, context: Context) -> str | None:
        said = (super().remark(module, context), remark_on_left(module))
        return "; ".join(filter(None, said)) or None

    def converted(self, name: str, layer: nn.Module, head: nn.Module | None, context: Context) -> nn.Module:
        first = len(context.left_alone)
        made = super().converted(name, self.base.converted(name, layer, head, context), head, context)
        own = [dataclasses.replace(left, technique=self) for left in context.left_alone[first:]]
        context.left_alone[first:] = own[:1]
        return made


def _adapted_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """peft's layers, by path."""
    from peft.tuners.lora import LoraLayer

    return [(name, child) for name, child in module.named_modules() if isinstance(child, LoraLayer)]


def _is_product(layer: nn.Module) -> bool:
    """Whether a layer multiplies by its weight, however that is kept, or looks up rows of it."""
    from torch import nn

    return (
        is_linear(layer)
        or isinstance(layer, nn.Embedding)
        or all(isinstance(getattr(layer, said, None), int) for said in ("in_features", "out_features"))
    )


def _freeze(layer: nn.Module) -> None:
    for parameter in layer._parameters.values():
        if parameter is not None:
            parameter.requires_grad_(False)


def _passes_gradients(layer: Any) -> bool | None:
    """Whether gradients pass through the frozen layer beneath peft's; ``None`` if this layer cannot tell.

    Seen on two rows: where the layer's outputs for them differ, the gradient of one is not zero. Weights that are all
    zero, as those of residual branches at the start, give equal outputs and no gradient, and say nothing.
    """
    import torch

    base = layer.get_base_layer()
    if isinstance(base, torch.nn.Embedding):
        return True
    held = [tensor for tensor in (*base.parameters(), *base.buffers()) if tensor.is_floating_point()]
    dtype = held[0].dtype if held else torch.float32
    draws = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        rows = torch.randn(1, 2, layer.in_features, generator=draws).to(_device(base), dtype).requires_grad_()
        outputs = base(rows)
        if not outputs.requires_grad:
            return False
        weights = torch.randn(outputs.shape[-1], generator=draws).to(outputs)
        gradient = torch.autograd.grad((outputs * weights).sum(), rows, allow_unused=True)[0]
    if gradient is not None and bool(gradient.any()):
        return True
    return None if torch.equal(outputs[:, 0], outputs[:, 1]) else False


def _device(layer: nn.Module) -> torch.device:
    return next(itertools.chain(layer.parameters(), layer.buffers())).device
