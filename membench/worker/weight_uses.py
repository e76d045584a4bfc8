"""Watching a forward pass for code that uses the weight of a layer past the layer's own forward.

Such code (``torch.nn.MultiheadAttention``, fused state-space mixers) breaks, or silently computes with codes for
numbers, where a technique replaces the layer. What is seen is how attributes are taken and what operations get,
whatever classes the model is made of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from membench.plugins.replacing import WeightUse, has_its_own
from membench.worker.child_process import run_in_child

if TYPE_CHECKING:
    from torch import nn

    from membench.plugins import Context, Model, Workload

_TOKENS = 4
_OWN_PRODUCTS = ("linear", "embedding", "addmm")
"""What the forward of a linear layer or of an embedding does with its weight; transformers' Conv1D takes the last."""
_METADATA = (
    "dtype", "device", "shape", "requires_grad", "ndim", "layout", "is_leaf", "is_cuda", "is_meta", "is_quantized",
    "is_sparse", "is_nested", "grad_fn", "names", "itemsize", "nbytes", "size", "dim", "stride", "numel",
    "is_floating_point", "is_complex", "element_size", "is_contiguous", "storage_offset", "data_ptr", "__len__",
    "_version", "is_inference", "grad", "is_cpu", "is_mps", "is_xpu", "get_device", "nelement", "ndimension",
)  # fmt: skip
"""Questions about a tensor, which a tensor subclass answers as the plain one did."""


def find(model: Model, workload: Workload, context: Context) -> dict[str, WeightUse] | None:
    """Return who uses the weights of a model's layers, by path; ``None`` if no forward pass could be watched.

    The model is run without data, on the meta device, or else built for it; in a process of its own, of which nothing
    remains. Call it before this process starts threads.
    """
    for build in (model.skeleton, functools.partial(model.build, context)):
        with contextlib.suppress(Exception):  # a model that is not made for it, or needs more than token ids
            found = run_in_child(functools.partial(_watched, build, workload, context))
            return {path: WeightUse(*use) for path, use in found.items()}
    return None


def _watched(build: Callable[[], nn.Module], workload: Workload, context: Context) -> dict[str, list[Any]]:
    import torch

    module = build()
    tensor = next(itertools.chain(module.parameters(), module.buffers()))
    ids = torch.zeros(_TOKENS, dtype=torch.long, device=tensor.device)

    def pass_over(module: nn.Module) -> None:
        if context.model.gives_logits:
            workload.logits(module, ids, (), context)
        else:
            module(ids[None])

    def forward() -> None:
        with torch.no_grad():
            pass_over(module.eval())
        if workload.trains:
            with torch.enable_grad():
                pass_over(module.train())

    return {path: list(dataclasses.astuple(use)) for path, use in watch(module, forward).items()}


def watch(module: nn.Module, forward: Callable[[], object]) -> dict[str, WeightUse]:
    """Run a forward pass of a module and return, by the path of each layer with a weight, who used its weight.

    It changes ``torch.nn.Module`` for good, so call it in a process of its own.
    """
    from torch import nn
    from torch.overrides import TorchFunctionMode

    class Operations(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
        ) -> Any:
            seen.operation(_name_of(function), (*arguments, *(options or {}).values()))
            return function(*arguments, **(options or {}))

    seen = _Seen(module)
    plain_getattr = nn.Module.__getattr__

    def watching_getattr(layer: nn.Module, name: str) -> Any:
        if name == "weight" and id(layer) in seen.layers:
            seen.taken(layer)
        return plain_getattr(layer, name)

    nn.Module.__getattr__ = watching_getattr  # type: ignore[method-assign]
    with Operations():
        forward()
    return seen.by_path()


class _Seen:
    """What was seen, by the identity of a layer.

    Attributes:
        layers: the path of each layer that has a weight.
        uses: as the first fields of ``WeightUse``.
    """

    def __init__(self, module: nn.Module) -> None:
        with_weight = [(path, child) for path, child in module.named_modules() if "weight" in child._parameters]
        self.layers = {id(child): path for path, child in with_weight}
        self.uses = {id(child): ["", "", ""] for _, child in with_weight}
        self._owners: dict[int, list[nn.Module]] = {}
        for _, child in with_weight:
            self._owners.setdefault(id(child._parameters["weight"]), []).append(child)

    def by_path(self) -> dict[str, WeightUse]:
        """Return what was seen; who uses a weight that layers share, uses it whichever layer it is taken from."""
        from torch import nn

        found = {}
        for sharers in self._owners.values():
            taken, computed = (next(filter(None, (self.uses[id(each)][at] for each in sharers)), "") for at in (0, 1))
            for layer in sharers:
                others = [each for each in sharers if each is not layer]
                tables = (self.layers[id(each)] for each in others if isinstance(each, nn.Embedding))
                unlike = (self.layers[id(each)] for each in others if has_its_own(each))
                found[self.layers[id(layer)]] = WeightUse(
                    taken, computed, self.uses[id(layer)][2], next(tables, ""), next(unlike, "")
                )
        return found

    def taken(self, layer: nn.Module) -> None:
        """Note that ``layer.weight`` was taken."""
        running = list(_running_modules())
        if not any(each is layer for each in running):
            self.uses[id(layer)][0] = _kind(running)

    def operation(self, name: str, arguments: Sequence[Any]) -> None:
        """Note an operation on weights."""
        owners = [layer for value in _flat(arguments) for layer in self._owners.get(id(value), ())]
        if not owners or name in _METADATA:
            return
        running = list(_running_modules())
        own = [layer for layer in owners if any(each is layer for each in running)]
        for layer in own:
            if name not in _OWN_PRODUCTS:
                self.uses[id(layer)][2] = name
        if not own:
            for layer in owners:
                self.uses[id(layer)][1] = _kind(running)


def _running_modules() -> Iterator[nn.Module]:
    """Yield the modules whose methods are running, innermost first."""
    from torch import nn

    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            yield owner
        frame = frame.f_back  # type: ignore[assignment]


def _kind(running: Sequence[nn.Module]) -> str:
    return type(running[0]).__name__ if running else "the workload"


def _flat(values: Any) -> Iterator[object]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    elif isinstance(values, Mapping):
        yield from _flat(list(values.values()))
    else:
        yield values


def _name_of(function: Any) -> str:
    """Return an operation's name; that of the attribute where one is read."""
    name = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", name) if name == "__get__" else name
