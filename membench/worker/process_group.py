"""The process group of a case's ranks, and the mesh over it."""

from __future__ import annotations

import datetime
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from membench.errors import MembenchError
from membench.host.device import Device
from membench.plugins import Parallel, Ranks, Technique, Unsuitable
from membench.plugins.parallel import degrees
from membench.plugins.ranks import DIMENSIONS
from membench.protocol.requests import Rank

if TYPE_CHECKING:
    from collections.abc import Sequence

_NEVER = datetime.timedelta(days=30)
"""The runner ends ranks that hang, by the time limit of the job; a second limit would name a wrong culprit."""
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""All ranks are on this machine. The name of the host need not lead to it."""


def refuse_without_ranks(rank: Rank, techniques: Sequence[Technique]) -> None:
    """Check that ranks have something to do.

    Raises:
        plugins.Unsuitable: if no technique of the stack spreads the case over them.
    """
    if rank.is_one_of_several and not any(isinstance(each, Parallel) for each in techniques):
        raise Unsuitable(f"no technique of the stack spreads the case over {rank.of} ranks, as ddp and fsdp do")


def join(rank: Rank, techniques: Sequence[Technique], shared: Path) -> Ranks:
    """Meet the other ranks of the case; all of them must call it.

    Args:
        shared: a folder that all ranks see.
    """
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    for name, value in _LOOPBACK.items():
        os.environ.setdefault(name, value)
    kind = Device.parse(rank.device).kind
    if kind == "cuda":
        torch.cuda.set_device(rank.device)
    shared.mkdir(exist_ok=True)
    if not distributed.is_available():
        raise MembenchError("this build of torch has no torch.distributed")
    distributed.init_process_group(
        "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
        store=torch._C._distributed_c10d.FileStore(str(shared / "ranks"), rank.of),
        rank=rank.number,
        world_size=rank.of,
        timeout=_NEVER,
    )
    found = degrees(techniques, rank.of)
    assert math.prod(found.values()) == rank.of
    names = tuple(dimension for dimension in DIMENSIONS if dimension in found)
    mesh = init_device_mesh(kind, tuple(found[name] for name in names), mesh_dim_names=names)
    return Ranks(rank.number, rank.of, mesh, shared)


def rehearse_collectives(device: str) -> None:
    """Run each collective once, so that what a backend sets up at the first one is in no figure."""
    import torch
    from torch import distributed

    size, ones = distributed.get_world_size(), torch.ones(4 * distributed.get_world_size(), device=device)
    distributed.all_reduce(ones)
    distributed.all_gather_into_tensor(torch.empty(size * len(ones), device=device), ones)
    distributed.reduce_scatter_tensor(torch.empty(4, device=device), ones)
    distributed.broadcast(ones, 0)
    distributed.all_to_all_single(torch.empty_like(ones), ones)
    distributed.barrier()
