"""Functions run on ranks over gloo, without a suite: for what torch's own machinery does with known amounts."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed

_T = TypeVar("_T")
_COLLECTIVE_TIMEOUT = timedelta(seconds=60)
"""A rank that raises leaves the others waiting in a collective, by default for half an hour."""


def on_ranks(function: Callable[[], _T], folder: Path, of: int = 2) -> list[_T]:
    """Return what a function of a module returns on each rank; it is called once all have met."""
    meeting = folder / "meeting"
    with ProcessPoolExecutor(of, get_context("spawn")) as pool:
        return list(pool.map(_on_one, [function] * of, range(of), [of] * of, [meeting] * of))


def _on_one(function: Callable[[], _T], number: int, of: int, meeting: Path) -> _T:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = torch._C._distributed_c10d.FileStore(str(meeting), of)
    distributed.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT, store=store, rank=number, world_size=of)
    try:
        return function()
    finally:
        distributed.destroy_process_group()
