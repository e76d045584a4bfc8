"""Ways to get a model into memory from a file, and what each of them holds meanwhile.

The file is written in a process of its own before anything is measured, so it lies in the page cache: the time to load
is that of a warm start.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from membench.builtin.techniques.mapped_checkpoint import Held, MappedCheckpoint, held_by, needs_room, write
from membench.host.device import Device
from membench.host.environment import available_bytes
from membench.plugins import (
    Context,
    DoesNotFit,
    LayerWise,
    Model,
    Setting,
    Technique,
    Unsuitable,
    output_head,
    replaced,
)
from membench.units import format_bytes
from membench.worker.weights import fingerprint, kept_tensors, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Loading(Technique):
    """Loads the model from a file in the case's folder; the rest of the stack finds it there."""

    imports: ClassVar[tuple[str, ...]] = ("torch",)
    acts_on: ClassVar[str] = "loading"

    def refuse(self, setting: Setting) -> str | None:
        if setting.before:
            return "it loads the model, so it has to come first in the stack"
        if Device.parse(setting.device).kind not in self.devices:
            return "pages of a file can be weights on a CPU only"
        return None

    def loading_bytes(self, weights_bytes: int, rest: Sequence[Technique]) -> int | None:
        return weights_bytes

    def prepare(self, make: Callable[[], nn.Module], context: Context) -> None:
        needs_room(_built_bytes(context.model), context.scratch)
        write(make, _path(context))


def _built_bytes(model: Model) -> int:
    """Return the bytes of a model's weights as far as they are known before it is built."""
    try:
        return model.needed_bytes() or 0
    except NotImplementedError:  # it has no skeleton
        return 0


def _path(context: Context) -> Path:
    return context.scratch / "loaded.weights"


class PlainLoad(_Loading):
    """The model is built, its checkpoint read whole, and copied into it: both are there at once, as many scripts do.

    ``model.load_state_dict(torch.load(path))``: at the peak 2 × the weights' bytes, once as the state dict and once as
    the model, whose first weights are drawn only to be overwritten.
    """

    def loading_bytes(self, weights_bytes: int, rest: Sequence[Technique]) -> int | None:
        return 2 * weights_bytes

    def prepare(self, make: Callable[[], nn.Module], context: Context) -> None:
        import torch

        module = make()
        needs_room(weight_bytes(module), context.scratch)
        torch.save(module.state_dict(), _path(context).with_suffix(".pt"))

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        import torch

        module = build()
        state = torch.load(_path(context).with_suffix(".pt"), map_location=context.device, weights_only=True)
        module.load_state_dict(state)
        return module


class MetaInit(_Loading):
    """The model is made on the meta device, without memory, and each tensor read from the file takes its place.

    At the peak 1 × the weights' bytes: nothing is drawn first and nothing is there twice. Shared weights stay shared,
    and what no state dict has (rotary angles) is read too. Source: ``torch.device("meta")`` and
    ``load_state_dict(assign=True)``. Wants a model with a skeleton.
    """

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        checkpoint = MappedCheckpoint(_path(context))
        module = checkpoint.skeleton(context.model)
        for held in held_by(module):
            held.fill(checkpoint.read(held.name).to(context.device))
        return module


class MemoryMapped(_Loading):
    """The weights are the pages of a memory-mapped safetensors file: none is read before it is used, none is copied.

    They count as file pages, not as live memory: 0 × the weights' bytes live. The kernel may drop them whenever memory
    is short and reads them again, and processes that map the same file share them; but a step that uses all weights
    needs them all, and then the footprint is that of other ways. What is written to them (training) becomes live.
    Wants a CPU and a model with a skeleton.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def loading_bytes(self, weights_bytes: int, rest: Sequence[Technique]) -> int | None:
        return 0

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        from torch import nn

        checkpoint = MappedCheckpoint(_path(context))
        module = checkpoint.skeleton(context.model)
        for held in held_by(module):
            # Buffers are small, and would keep the file mapped when all weights have been converted.
            is_weight = isinstance(held.tensor, nn.Parameter)
            held.fill(checkpoint.mapped(held.name) if is_weight else checkpoint.read(held.name))
        return module


class Streamed(_Loading):
    """Layer by layer from a memory-mapped checkpoint, each converted at once by the later members of the stack.

    At the peak the result and one layer's temporaries: a layer's weights are read where the file is mapped and are in
    live memory only as converted. The file's pages are given back after each layer, the largest first, so that the
    footprint's peak is the result and at most the largest layer's pages. On a GPU the layer's weights are there while
    it is converted. Conversion is part of the phase ``load``. Later members must convert layer by layer. Wants a model
    with a skeleton.
    """

    applies_rest: ClassVar[bool] = True

    def refuse(self, setting: Setting) -> str | None:
        for member in setting.after:
            if not _goes_layer_by_layer(member):
                return f"'{_name_of(member)}' changes the model as a whole, so it cannot be streamed layer by layer"
        return super().refuse(setting)

    def loading_bytes(self, weights_bytes: int, rest: Sequence[Technique]) -> int | None:
        """Return the least bytes of the result: as if all of it had the nominal bits of the member with the fewest."""
        layer_wise = [member for member in rest if isinstance(member, LayerWise)]
        bits = [member.nominal_bits() for member in layer_wise]
        known = [each for each in bits if each is not None]
        if len(known) < len(bits) or any(member.nominal_share() != 1 for member in layer_wise):
            return None
        return int(weights_bytes * min([32.0, *known]) / 32)  # of a model built in 16 bits it is more

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        checkpoint = MappedCheckpoint(_path(context))
        module = checkpoint.skeleton(context.model)
        converters = [technique.for_rehearsal(context) for technique in rest if isinstance(technique, LayerWise)]
        names = {name for name, layer in module.named_modules() if layer._parameters}
        for converter in converters:
            converter.check_patterns(sorted(names), context)
        others, units = _units(module)
        for held in others:
            held.fill(checkpoint.read(held.name).to(context.device))
        changed = [False for _ in converters]
        while units:  # what is done with is let go: layers that were replaced still hold their weights
            module = _streamed(module, units.pop(0), names, checkpoint, converters, changed, context)
        members = [technique for technique in rest if isinstance(technique, LayerWise)]
        context.idle.extend(member for member, did in zip(members, changed, strict=True) if not did)
        return module


@dataclass
class _Unit:
    """Layers that share weights, by name, and these weights: they are converted together."""

    layers: list[str]
    weights: list[Held]


def _units(module: nn.Module) -> tuple[list[Held], list[_Unit]]:
    """What no layer has as a weight of its own (rotary angles), and the units, the largest first."""
    layer_of = {id(layer._parameters): name for name, layer in module.named_modules() if layer._parameters}
    others: list[Held] = []
    unit_of: dict[str, _Unit] = {name: _Unit([name], []) for name in layer_of.values()}
    for held in held_by(module):
        sharers = [layer_of[id(holder)] for holder, _ in held.places if id(holder) in layer_of]
        if not sharers:
            others.append(held)
            continue
        unit = unit_of[sharers[0]]
        unit.weights.append(held)
        for name in sharers[1:]:
            joined = unit_of[name]
            if joined is not unit:
                unit.layers += joined.layers
                unit.weights += joined.weights
                unit_of |= dict.fromkeys(joined.layers, unit)
    units = {id(unit): unit for unit in unit_of.values()}.values()
    return others, sorted(units, key=lambda unit: -sum(held.tensor.nbytes for held in unit.weights))


def _streamed(
    module: nn.Module,
    unit: _Unit,
    names: set[str],
    checkpoint: MappedCheckpoint,
    converters: Sequence[LayerWise],
    changed: list[bool],
    context: Context,
) -> nn.Module:
    """The module with a unit read and converted.

    Args:
        names: of all layers, converted or not.
        changed: by converter, whether it has changed any layer; it is kept up to date.
    """
    for held in unit.weights:
        held.fill(checkpoint.touched(held.name, context.part).to(context.device))
    with context.part("convert"):
        for name in unit.layers:
            module = _converted(module, name, names, converters, changed, context)
    for name in unit.layers:
        for tensor in kept_tensors(module.get_submodule(name)):
            checkpoint.take_over(tensor)
    checkpoint.drop_pages([held.name for held in unit.weights], context.part)
    return module


def _converted(
    module: nn.Module,
    name: str,
    names: set[str],
    converters: Sequence[LayerWise],
    changed: list[bool],
    context: Context,
) -> nn.Module:
    """The module with one layer converted by one technique after the other, and by each what the last one made of it.

    The same calls come as when each technique goes through the whole module before the next one does.
    """
    pieces = [name]
    for place, technique in enumerate(converters):
        made = []
        for path in pieces:
            layer = module.get_submodule(path)
            before = fingerprint(layer)
            piece = technique.converted(path, layer, output_head(module), context)
            changed[place] |= fingerprint(piece) != before
            del layer  # its weights
            module = replaced(module, path, piece)
            inside = {f"{path}.{inner}".strip("."): child for inner, child in piece.named_modules()}
            made += [at for at, child in inside.items() if child._parameters and (at == path or at not in names)]
        pieces = made
    return module


def _goes_layer_by_layer(member: Technique) -> bool:
    """Whether a member converts layer by layer, or does nothing to the model."""
    kind = type(member)
    return isinstance(member, LayerWise) or (kind.apply is Technique.apply and kind.load is Technique.load)


def _name_of(member: Technique) -> str:
    """The name that a technique goes by in suites."""
    where = f"{type(member).__module__}:{type(member).__qualname__}"
    entries = entry_points(group="membench.techniques")
    return next((entry.name for entry in entries if entry.value == where), type(member).__name__)


class Saved(_Loading):
    """The rest of the stack is applied in another process, saved, and loaded here as a server would: nothing else.

    What converting leaves behind in its process is not here, and ``load`` shows what a start from the converted
    checkpoint takes. The whole module is pickled (``torch.save``), because what techniques make of it (tensor classes,
    layers of their own) has no other common form; loading it runs what is pickled (``weights_only=False``), which is
    right for a file that this very case has written and for no other. ``mmap`` leaves the weights in the file's pages.
    Members for training (optimizers, losses) do their part in the measured process as ever.
    """

    applies_rest: ClassVar[bool] = True
    prepares_rest: ClassVar[bool] = True
    mmap: bool = False

    def refuse(self, setting: Setting) -> str | None:
        if self.mmap and setting.device != "cpu":
            return "mmap = true: pages of a file can be weights on a CPU only"
        return super().refuse(setting)

    def loading_bytes(self, weights_bytes: int, rest: Sequence[Technique]) -> int | None:
        return None

    def prepare(self, make: Callable[[], nn.Module], context: Context) -> None:
        import torch

        built_bytes, left_bytes = _built_bytes(context.model), available_bytes()
        if context.device == "cpu" and built_bytes > left_bytes:
            raise DoesNotFit(
                f"building the model to convert it needs {format_bytes(built_bytes)};"
                f" {format_bytes(left_bytes)} are available on this machine"
            )
        module = make()
        needs_room(weight_bytes(module), context.scratch)
        try:
            torch.save(module, _path(context).with_suffix(".pt"), pickle_module=_Pickling)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise Unsuitable(f"what the stack makes of the model cannot be saved: {error}") from None

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        import torch

        module: nn.Module = torch.load(
            _path(context).with_suffix(".pt"),
            map_location=context.device,
            weights_only=False,
            mmap=self.mmap,
        )
        return module


class _Pickler(pickle.Pickler):
    """Pickles what libraries hang on modules and plain pickle cannot take."""

    def reducer_override(self, obj: Any) -> Any:
        from torch import nn

        if isinstance(obj, types.MethodType):
            # torchao puts methods of its own in single layers; plain pickle looks for them in the layer's class.
            return _bound, (obj.__func__, obj.__self__)
        kind = type(obj)
        if issubclass(kind, nn.Parameter) and kind is not nn.Parameter:
            # bitsandbytes' parameters would come back as plain ones. The state may lead back to the parameter.
            return _parameter, (kind, obj.data, obj.requires_grad), dict(vars(obj)), None, None, _set_attributes
        return NotImplemented


class _Pickling:
    """What ``torch.save`` needs to know of a pickle module."""

    Pickler = _Pickler


def _bound(function: Callable[..., Any], owner: Any) -> types.MethodType:
    return types.MethodType(function, owner)


def _parameter(kind: type[nn.Parameter], data: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    import torch

    return torch.Tensor._make_subclass(kind, data, requires_grad)


def _set_attributes(parameter: torch.Tensor, attributes: dict[str, Any]) -> None:
    vars(parameter).update(attributes)
