"""Which weights torch's data parallel techniques can handle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from membench.plugins import Unsuitable

if TYPE_CHECKING:
    from torch import nn


def refuse_other_weights(module: nn.Module, verb: str) -> None:
    """Check that all parameters are plain tensors, or parts of such that another technique has left on the rank.

    Args:
        verb: what is done to the weights, as a past participle.

    Raises:
        Unsuitable: if a parameter is of another kind: quantized or sparse.
    """
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.distributed.tensor import DTensor

    for name, parameter in module.named_parameters():
        plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
        # An estimate's tensors are fake ones; those that a subclass wraps are of that subclass.
        if not (plain or isinstance(parameter.data, DTensor | FakeTensor)) or parameter.layout is not torch.strided:
            kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
            raise Unsuitable(f"only plain weights can be {verb}, and '{name}' is a {kind}")
