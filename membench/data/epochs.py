"""Epochs of training data, read by this process or shared out among processes of torch's ``DataLoader``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from membench.plugins import TrainingData, Unsuitable
from membench.plugins.storage import Damaged

if TYPE_CHECKING:
    import torch


def endless(data: TrainingData, batch_size: int, seed: int, workers: int) -> Iterator[torch.Tensor]:
    """Batches of one epoch after the other; what does not fill one is left out. Opening the data is part of the first.

    Raises:
        Unsuitable: if no reader has rows enough for a batch.
    """
    opened = epochs(data, batch_size, seed, workers)
    for epoch in itertools.count():
        found = False
        for batch in opened(epoch):
            if len(batch) == batch_size:
                found = True
                yield batch
        if not found:
            raise Unsuitable(
                f"{data.extent.rows} rows, shared out among {workers} processes, give none the {batch_size} of a batch"
            )


def epochs(data: TrainingData, batch_size: int, seed: int, workers: int) -> Callable[[int], Iterator[torch.Tensor]]:
    """Opens the data, and gives the batches of an epoch by its number.

    Args:
        workers: processes of torch's ``DataLoader`` that read, each a share of the windows and with all that reading
            wants; 0: this process does. They start anew with each epoch, as is the ``DataLoader``'s own way, and run
            under the allocator that the measuring had chosen then. Their batches come in another order than those of
            one process.
    """
    if workers == 0:
        opened = data.opened()
        return lambda epoch: data.batches(batch_size, seed, epoch, opened)
    from torch.utils.data import DataLoader

    from membench.data.loading import Batches

    def batches(epoch: int) -> Iterator[torch.Tensor]:
        source = Batches(data, batch_size, seed, epoch)
        try:
            yield from DataLoader(source, batch_size=None, num_workers=workers, multiprocessing_context="fork")
        except (Damaged, MemoryError) as error:
            raise type(error)(_said_by_worker(error)) from None
        except Exception as error:
            raise RuntimeError(_said_by_worker(error)) from None

    return batches


def _said_by_worker(error: Exception) -> str:
    """What an error says: from a worker it stands at the end of the traceback that came with it."""
    last = str(error).strip().rpartition("\n")[2]
    return last.partition(": ")[2] if isinstance(error, Damaged) else last
