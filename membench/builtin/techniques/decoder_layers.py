"""Which modules of a model are its layers: the lists that a transformer keeps them in, or what a pattern names."""

from __future__ import annotations

import fnmatch
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from membench.builtin.techniques.pruning import is_linear
from membench.plugins import NotInModel, Unsuitable

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerList:
    """Layers that lie beside each other in a model, in the order in which it runs them.

    Attributes:
        path: of the module that holds them.
        names: the layers' names within it.
    """

    path: str
    holder: nn.Module
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]

    def __str__(self) -> str:
        kinds = Counter(type(layer).__name__ for layer in self.layers)
        pattern = f"{self.path}.*".removeprefix(".")
        return f"'{pattern}' ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers with their paths in the model."""
        return (
            (f"{self.path}.{name}".removeprefix("."), layer)
            for name, layer in zip(self.names, self.layers, strict=True)
        )

    def keep(self, kept: Sequence[int]) -> None:
        """Take the other layers out of the list.

        Raises:
            Unsuitable: if they are not in a list, from which any can be taken.
        """
        from torch import nn

        if not isinstance(self.holder, nn.ModuleList | nn.Sequential):
            kind = type(self.holder).__name__
            raise Unsuitable(f"layers are taken out of a ModuleList or a Sequential; '{self.path}' is a {kind}")
        places = [list(self.holder._modules).index(name) for name in self.names]
        for position in reversed(range(len(places))):
            if position in kept:
                continue
            if self.names[position].isdigit():
                del self.holder[places[position]]  # the later ones are numbered anew
            else:
                del self.holder._modules[self.names[position]]


def layer_lists(module: nn.Module, pattern: str | None) -> list[LayerList]:
    """The lists of a model's layers: those that a pattern over the paths of modules names, or else all there are.

    Raises:
        NotInModel: if the pattern matches no module.
        Unsuitable: if there is no pattern, and no list of like layers either.
    """
    found = list(_lists(module)) if pattern is None else _named(module, pattern)
    if found:
        return found
    kind, there = type(module).__name__, ", ".join(map(str, _lists(module)))
    if pattern is None:
        raise Unsuitable(f"a {kind} has no list of like layers: name them with layers = 'path.of.the.list.*'")
    raise NotInModel(
        f"layers = '{pattern}' matches no module of the {kind}; "
        + (f"its lists of layers are {there}" if there else f"its modules are {_children(module)}")
    )


def the_layer_list(module: nn.Module, pattern: str | None) -> LayerList:
    """The one list of a model's layers.

    Raises:
        NotInModel: if the pattern matches no module.
        Unsuitable: if there is none, or more than one.
    """
    found = layer_lists(module, pattern)
    if len(found) > 1:
        raise Unsuitable(
            f"the layers are in {len(found)} lists; name one with layers = …: {', '.join(map(str, found))}"
        )
    return found[0]


def whole_list(module: nn.Module, part: LayerList) -> LayerList:
    """The list that a pattern named some layers of; what it named, where that lies in no list of like layers."""
    named = set(part.names)
    return next((each for each in _lists(module) if each.path == part.path and named <= set(each.names)), part)


def left_whole(module: nn.Module, cut: Sequence[LayerList]) -> list[str]:
    """The paths of the lists of like layers that have a layer of which nothing is among those that are cut."""
    known = {id(layer) for each in cut for layer in each.layers}
    return [
        each.path
        for each in _lists(module)
        if not all(any(id(part) in known for part in layer.modules()) for layer in each.layers)
    ]


def outermost_named(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose paths match a pattern, without those inside of others that do."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if name and fnmatch.fnmatchcase(name, pattern) and not _inside(name, found):
            found[name] = child
    return found


def _named(module: nn.Module, pattern: str) -> list[LayerList]:
    by_holder: dict[str, dict[str, nn.Module]] = {}
    for path, layer in outermost_named(module, pattern).items():
        holder, _, name = path.rpartition(".")
        by_holder.setdefault(holder, {})[name] = layer
    return [
        LayerList(path, module.get_submodule(path), tuple(layers), tuple(layers.values()))
        for path, layers in by_holder.items()
    ]


def _lists(module: nn.Module) -> Iterator[LayerList]:
    """The outermost lists of like layers.

    In transformers' models a layer is what gradient checkpointing acts on. Elsewhere it is a module of more than one
    part, with linear layers in it, beside others of its class.
    """
    from torch import nn

    known = checkpointing_layer()
    if known is not None and not any(isinstance(child, known) for child in module.modules()):
        known = None
    taken: dict[str, Any] = {}
    for path, holder in module.named_modules():
        if not isinstance(holder, nn.ModuleList | nn.Sequential) or _inside(path, taken):
            continue
        members = {name: child for name, child in holder._modules.items() if child is not None}
        if known is not None:
            layers = {name: child for name, child in members.items() if isinstance(child, known)}
        else:
            kinds = Counter(type(child) for child in members.values() if _is_compound(child))
            most, count = kinds.most_common(1)[0] if kinds else (None, 0)
            layers = {name: child for name, child in members.items() if type(child) is most} if count > 1 else {}
        if layers:
            taken[path] = holder
            yield LayerList(path, holder, tuple(layers), tuple(layers.values()))


def checkpointing_layer() -> Any:
    """transformers' base class of layers, if its models are loaded at all."""
    loaded: Any = sys.modules.get("transformers.modeling_layers")
    return getattr(loaded, "GradientCheckpointingLayer", None)


def _is_compound(child: nn.Module) -> bool:
    return bool(child._modules) and any(is_linear(part) for part in child.modules())


def _inside(path: str, others: dict[str, Any]) -> bool:
    return any(not other or path.startswith(f"{other}.") for other in others)


def _children(module: nn.Module) -> str:
    named = [f"'{name}' ({type(child).__name__})" for name, child in module.named_children()]
    return ", ".join(named[:8]) + (" and more" if len(named) > 8 else "") if named else "none"
