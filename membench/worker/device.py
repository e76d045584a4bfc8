"""Inside the measured process: its threads and its GPU, before anything is measured."""

from __future__ import annotations

from membench import plugins
from membench.protocol.messages import GpuFound
from membench.protocol.readings import GpuReading
from membench.worker.meter import Meter


def refuse_missing(device: str) -> None:
    """See that there is such a GPU.

    Raises:
        plugins.Unsuitable: if there is not.
    """
    import torch

    if not torch.cuda.is_available():
        raise plugins.Unsuitable("no CUDA device here, or a torch build without CUDA")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise plugins.Unsuitable(f"there is no {device} here: the last is cuda:{last}")


def wake(device: str) -> None:
    """Let torch set up what it sets up once: thread pool, CUDA context, kernels' code pages."""
    import torch

    layer = torch.nn.Linear(256, 256, device=device)
    torch.nn.functional.gelu(layer(torch.ones(64, 256, device=device))).softmax(-1).sum().backward()


def announce_gpu(meter: Meter, device: str) -> None:
    """Tell the runner which device it is, so that it can find it in NVML, where devices have another order."""
    import torch

    # cuBLAS keeps workspaces of the rehearsal in torch's allocator; a case that needs them takes them anew.
    torch._C._cuda_clearCublasWorkspaces()
    properties = torch.cuda.get_device_properties(device)
    meter.tell(
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
