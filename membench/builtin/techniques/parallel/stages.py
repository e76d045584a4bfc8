"""A decoder cut into the stages of a pipeline: which modules each has, and whether they compute what the whole does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from membench.builtin.techniques.decoder_config import config_of, describe_layers
from membench.builtin.techniques.decoder_layers import LayerList, the_layer_list
from membench.errors import summary
from membench.plugins import NotInModel, Unsuitable, logits_of
from membench.worker.evaluating import evaluating

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.builtin.layers.stage import Entrance, StageForward

_TRIED_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a forward pass of the whole model over a few tokens shows.

    Attributes:
        logits: (1, T, V).
        hidden: what the last layer returns, (1, T, H).
        in_tuple: whether layers return their hidden states in a tuple.
        before: what modules with weights that run before the layers return, by path.
        after: the paths of modules with weights that run behind the layers.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor
    in_tuple: bool
    before: Mapping[str, torch.Tensor]
    after: tuple[str, ...]


class Stages:
    """A decoder's stages. The first has what runs before the layers, the last what runs behind them.

    Args:
        count: of the stages.
        pattern: of the paths of the layers; ``None``: as the model's class says.
        longer: whether layers are copied where there are fewer than stages, for the miniature of a rehearsal.

    Raises:
        Unsuitable: if the model cannot be cut, or does not compute the same when it is.
        NotInModel: if the pattern matches no module.
    """

    def __init__(self, module: nn.Module, count: int, pattern: str | None, *, longer: bool) -> None:
        self.module, self.count = module, count
        self._kind = type(module).__name__
        self._layers = the_layer_list(module, pattern)
        if longer and len(self._layers.layers) < count:
            self._layers = _lengthened(module, self._layers, count)
        number = len(self._layers.layers)
        if number < count:
            raise Unsuitable(f"{count} stages need as many layers, and the model has {number}")
        # The first ones get one more where the layers do not share out evenly, as the last one has the head.
        sizes = [number // count + (stage < number % count) for stage in range(count)]
        self._bounds = [(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(count)]
        with evaluating(module):
            self.seen = _seen(module, self._layers)
            self.tied = self._tied()
            if count > 1:
                self._check_stages()

    def keep(self, stages: Sequence[int]) -> list[nn.Module]:
        """Leave the module only what some of its stages have, and return what runs each of them."""
        from membench.builtin.layers.stage import Chunk

        kept = [self._stand_ins(stage) for stage in stages]
        if len(stages) == 1:
            for place, stand_in in kept[0].places.items():
                _put(self.module, place, stand_in)
            self.module.forward = kept[0].forward
            return [self.module]
        owned = [self._owned(stage) for stage in stages]
        for place in set.intersection(*(set(each.places) for each in kept)):
            _put(self.module, place, kept[0].places[place])

        # Nothing may refer to what other stages have from here on.
        return [Chunk(modules, _running(self.module, each)) for modules, each in zip(owned, kept, strict=True)]

    def _owned(self, stage: int) -> list[nn.Module]:
        first, end = self._bounds[stage]
        paths = [*(self.seen.before if stage == 0 else ()), *(self.seen.after if stage == self.count - 1 else ())]
        return [*map(self.module.get_submodule, paths), *self._layers.layers[first:end]]

    def _tied(self) -> list[tuple[str, str]]:
        """Return the weights that the first and the last stage share, by their paths before and behind the layers.

        Raises:
            Unsuitable: if other stages share weights.
        """
        found: dict[int, set[int]] = {}
        for stage in range(self.count):
            for owner in self._owned(stage):
                for parameter in owner.parameters():
                    found.setdefault(id(parameter), set()).add(stage)
        paths = {id(each): name for name, each in self.module.named_parameters()}
        shared = {number: stages for number, stages in found.items() if len(stages) > 1}
        if any(stages != {0, self.count - 1} for stages in shared.values()):
            raise Unsuitable(f"layers of a {self._kind} in different stages share weights")
        if left := [name for number, name in paths.items() if number not in found]:
            raise Unsuitable(
                f"'{left[0]}' of a {self._kind} belongs to no stage: it is in no module that runs before, in or behind"
                " the layers"
            )
        return [(self._path_of(number, self.seen.before), self._path_of(number, self.seen.after)) for number in shared]

    def _path_of(self, number: int, paths: Iterable[str]) -> str:
        for path in paths:
            for name, parameter in self.module.get_submodule(path).named_parameters():
                if id(parameter) == number:
                    return f"{path}.{name}"
        raise Unsuitable(f"a layer of a {self._kind} shares its weights with a module outside of the layers")

    def _stand_ins(self, stage: int) -> _StandIns:
        from membench.builtin.layers.stage import AbsentInput, AbsentLayer, Entrance, Exit, StageForward

        first, end = self._bounds[stage]
        places: dict[str, nn.Module] = {}
        entrance: Entrance | None = None
        for number, (path, layer) in enumerate(self._layers.named()):
            if first <= number < end:
                continue
            kind = Entrance if number == first - 1 else Exit if number == end else AbsentLayer
            places[path] = kind(layer, in_tuple=self.seen.in_tuple)
            entrance = places[path] if isinstance(places[path], Entrance) else entrance  # type: ignore[assignment]
        if stage > 0:
            places |= {path: AbsentInput(out.shape[-1], out.dtype) for path, out in self.seen.before.items()}
        if stage < self.count - 1:
            places |= {path: AbsentLayer(self.module.get_submodule(path), in_tuple=False) for path in self.seen.after}
        return _StandIns(places, StageForward(self.module, entrance, self.seen.hidden.dtype))

    def _check_stages(self) -> None:
        """Check that the stages one after the other compute what the whole model does.

        Raises:
            Unsuitable: if they do not.
        """
        import torch

        passed, what = self.seen.ids, f"a {self._kind} cannot be cut into stages between its layers"
        try:
            for stage in map(self._stand_ins, range(self.count)):
                passed = _running(self.module, stage)(passed)
        except Exception as error:
            raise Unsuitable(f"{what}: {summary(error)}") from error
        if passed.shape != self.seen.logits.shape or not torch.allclose(
            passed, self.seen.logits, rtol=1e-3, atol=1e-3 * self.seen.logits.abs().max().item()
        ):
            raise Unsuitable(f"{what}: it then computes other logits")


@dataclasses.dataclass(frozen=True)
class _StandIns:
    """What stands for all that a stage does not have, by path, and the stage's forward."""

    places: Mapping[str, nn.Module]
    forward: StageForward


def _running(module: nn.Module, stage: _StandIns) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what runs a stage with its stand-ins in their places, and then puts back what was there."""

    def run(given: torch.Tensor) -> torch.Tensor:
        before = {place: _put(module, place, stand_in) for place, stand_in in stage.places.items()}
        try:
            return stage.forward(given)
        finally:
            for place, child in before.items():
                _put(module, place, child)

    return run


def _put(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """Put a module at a path; return what was there."""
    parent, _, name = path.rpartition(".")
    modules = module.get_submodule(parent)._modules
    before = modules[name]
    assert before is not None
    modules[name] = child
    return before


def _seen(module: nn.Module, layers: LayerList) -> Seen:
    """Run a module over a few tokens, and see which of its modules run when.

    Raises:
        Unsuitable: if it does not run its layers one after the other.
    """
    import torch

    number = {id(layer): place for place, layer in enumerate(layers.layers)}
    inside = {id(part) for layer in layers.layers for part in layer.modules()}
    run: list[int] = []
    returned: list[Any] = []
    began: dict[str, int] = {}
    before: dict[str, torch.Tensor] = {}
    after: list[str] = []
    hooks = []

    def layer_runs(layer: nn.Module, given: Any, output: Any) -> None:
        run.append(number[id(layer)])
        returned.append(output)

    for layer in layers.layers:
        hooks.append(layer.register_forward_hook(layer_runs))
    for path, child in module.named_modules():
        if id(child) in inside or not _has_weights(child):
            continue

        def begins(child: nn.Module, given: Any, path: str = path) -> None:
            began[path] = len(run)

        def ends(child: nn.Module, given: Any, output: Any, path: str = path) -> None:
            if not run:
                before[path] = output
            elif began[path] == len(layers.layers):
                after.append(path)

        hooks += [child.register_forward_pre_hook(begins), child.register_forward_hook(ends)]
    first = next(module.parameters())
    ids = torch.arange(_TRIED_TOKENS, device=first.device)[None]
    try:
        logits = logits_of(module(ids), ids)
    finally:
        for hook in hooks:
            hook.remove()
    if run != list(range(len(layers.layers))):
        raise Unsuitable(f"a {type(module).__name__} does not run its layers {layers} one after the other")
    in_tuple = isinstance(returned[-1], tuple)
    hidden = returned[-1][0] if in_tuple else returned[-1]
    if not isinstance(hidden, torch.Tensor) or not all(isinstance(each, torch.Tensor) for each in before.values()):
        raise Unsuitable(f"the layers of a {type(module).__name__} return no hidden states that can be sent")
    return Seen(ids, logits, hidden, in_tuple, before, tuple(after))


def _has_weights(module: nn.Module) -> bool:
    """Return whether a module holds parameters or packed weights itself; what it computes anew each time is neither."""
    buffers = (each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set)
    return any(each is not None for each in (*module._parameters.values(), *buffers))


def _lengthened(module: nn.Module, layers: LayerList, count: int) -> LayerList:
    """Append copies of the last layer to a list."""
    from torch import nn

    if not isinstance(layers.holder, nn.ModuleList | nn.Sequential):
        raise NotInModel(f"'{layers.path}' is no list of layers that can be made longer for a rehearsal")
    before = len(layers.layers)
    kept = [*range(before), *[before - 1] * (count - before)]
    for number in range(before, count):
        layer = copy.deepcopy(layers.layers[-1])
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number  # type: ignore[assignment]  # its place in the key-value cache
        layers.holder.append(layer)
    describe_layers(config_of(module, layers.path), layers.path, before, kept)
    return the_layer_list(module, f"{layers.path}.*")
