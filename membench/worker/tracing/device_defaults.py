"""What torch does by itself on a GPU and not on a CPU, while the fake tensors of a CPU stand for those of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor

from membench.host.device import Device


@contextlib.contextmanager
def as_on(device: Device) -> Iterator[None]:
    """Let optimizers that are told nothing step as they do on a device.

    On a GPU they step through all tensors at once (``foreach``), with temporaries as large as all of these together,
    for Adam another copy of the second moments. On a CPU they take one tensor after the other.

    Source: torch.optim.optimizer, ``_default_to_fused_or_foreach``.
    """
    if not device.on_gpu:
        yield
        return
    from torch.optim import optimizer

    module: Any = optimizer
    devices, types = module._get_foreach_kernels_supported_devices, module._foreach_supported_types
    module._get_foreach_kernels_supported_devices = lambda: [*devices(), "cpu"]
    types.append(FakeTensor)
    try:
        yield
    finally:
        module._get_foreach_kernels_supported_devices = devices
        types.remove(FakeTensor)
