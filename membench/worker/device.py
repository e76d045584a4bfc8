"""Initialization of the measured process's device, before anything is measured."""

from __future__ import annotations

from membench import plugins
from membench.protocol.messages import GpuFound
from membench.protocol.readings import GpuReading
from membench.worker.meter import Meter


def refuse_missing(device: str) -> None:
    """Check that a GPU exists.

    Raises:
        plugins.Unsuitable: if it does not.
    """
    import torch

    if not torch.cuda.is_available():
        raise plugins.Unsuitable("no CUDA device here, or a torch build without CUDA")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise plugins.Unsuitable(f"there is no {device} here: the last is cuda:{last}")


def initialize(device: str) -> None:
    """Trigger torch's one-time initialization: thread pool, CUDA context, and code pages of kernels."""
    import torch

    layer = torch.nn.Linear(256, 256, device=device)
    torch.nn.functional.gelu(layer(torch.ones(64, 256, device=device))).softmax(-1).sum().backward()


def announce_gpu(meter: Meter, device: str) -> None:
    """Send the identity of the GPU to the runner, which looks it up in NVML, where devices may have another order."""
    import torch

    # cuBLAS keeps workspaces of the rehearsal in torch's allocator; a case that needs them allocates them again.
    torch._C._cuda_clearCublasWorkspaces()
    properties = torch.cuda.get_device_properties(device)
    meter.send(
        GpuFound(
            GpuReading(
                uuid=str(properties.uuid),
                name=properties.name,
                capability=[properties.major, properties.minor],
                memory_bytes=properties.total_memory,
                cuda=torch.version.cuda,
            )
        )
    )
