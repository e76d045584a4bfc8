"""Batches in the form that torch's ``DataLoader`` shares out among its processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, get_worker_info

if TYPE_CHECKING:
    from membench.plugins import TrainingData


class Batches(IterableDataset[torch.Tensor]):
    """The batches of an epoch; each process opens the data by itself and reads its own share of the windows."""

    def __init__(self, data: TrainingData, batch_size: int, seed: int, epoch: int) -> None:
        self._data, self._batch_size, self._seed, self._epoch = data, batch_size, seed, epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        share = (0, 1) if info is None else (info.id, info.num_workers)
        yield from self._data.batches(self._batch_size, self._seed, self._epoch, self._data.opened(), share)
