"""Modules of fake tensors: how they are made and converted."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from membench.worker.breakdown import tensors_in
from membench.worker.weights import kept_tensors

_T = TypeVar("_T")


@contextlib.contextmanager
def converting_fake_modules() -> Iterator[None]:
    """Let modules of fake tensors be converted and moved, as with ``module.to(torch.bfloat16)``.

    torch swaps the parameters of such modules, and refuses to where something refers to them weakly, as the mode of
    fake tensors itself does. Here their data are set, as for real ones.
    """
    original = nn.Module._apply

    def apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = _converted(parameter, fn)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def _converted(parameter: nn.Parameter, fn: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
    with torch.no_grad():
        made = fn(parameter)
        gradient = None if parameter.grad is None else fn(parameter.grad)
    is_plain = not is_traceable_wrapper_subclass(made) and not is_traceable_wrapper_subclass(parameter)
    if not is_plain or made.device != parameter.device:
        parameter = nn.Parameter(made, requires_grad=parameter.requires_grad)
    else:
        parameter.data = made
    parameter.grad = gradient
    return parameter


@contextlib.contextmanager
def making_fake_subclasses() -> Iterator[None]:
    """Let classes of parameters that libraries make with ``torch.Tensor._make_subclass`` hold fake tensors.

    What is made is of a class derived from the library's and from that of fake tensors.
    """
    original = torch.Tensor._make_subclass

    def make(kind: type[torch.Tensor], data: torch.Tensor, require_grad: bool = False, **options: Any) -> Any:
        if issubclass(kind, FakeTensor) or not isinstance(data, FakeTensor):
            return original(kind, data, require_grad, **options)
        made = data.detach()
        made.__class__ = _fake_class(kind)
        return made.requires_grad_(require_grad)

    torch.Tensor._make_subclass = make  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor._make_subclass = original  # type: ignore[method-assign]


@functools.cache
def _fake_class(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    own = {"__module__": kind.__module__, "__torch_dispatch__": FakeTensor.__torch_dispatch__}
    made: type[torch.Tensor] = types.new_class(kind.__name__, (kind, FakeTensor), {}, lambda names: names.update(own))
    return made


def with_storage(skeleton: nn.Module) -> nn.Module:
    """Return a module on the meta device with fake tensors on the CPU in place of its own; ties stay.

    To be called within a ``FakeTensorMode``.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        known = made.get(id(tensor))
        if known is None:
            known = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                known = nn.Parameter(known, requires_grad=tensor.requires_grad)
            made[id(tensor)] = known
        return known

    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return skeleton


def copied(held: _T) -> _T:
    """Return a module or a state dict with tensors of its own; those that share a storage in the same way still do."""
    made: dict[Any, torch.Tensor] = {}

    def like(tensor: torch.Tensor) -> torch.Tensor:
        if is_traceable_wrapper_subclass(tensor):
            return transform_subclass(tensor, lambda _, inner: like(inner))
        key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in made:
            made[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return made[key].detach()

    def known(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(like(tensor.data), requires_grad=tensor.requires_grad)
        return like(tensor)

    tensors = kept_tensors(held) if isinstance(held, nn.Module) else tensors_in(held)
    # Plain copies would copy bytes that fake tensors have not.
    return copy.deepcopy(held, {id(each): known(each) for each in list(tensors)})
