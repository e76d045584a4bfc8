"""Modules of fake tensors: how they are made and converted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


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
    if is_traceable_wrapper_subclass(made) or is_traceable_wrapper_subclass(parameter):
        parameter = nn.Parameter(made, requires_grad=parameter.requires_grad)
    else:
        parameter.data = made
    parameter.grad = gradient
    return parameter


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
