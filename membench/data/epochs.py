"""Epochs of training data, read by this process or shared out among processes of torch's ``DataLoader``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from membench.host.out_of_memory import is_out_of_memory
from membench.plugins import TrainingData, Unsuitable
from membench.plugins.storage import Damaged

if TYPE_CHECKING:
    import torch


def endless(data: TrainingData, batch_size: int, seed: int, workers: int) -> Iterator[torch.Tensor]:
    """Yield the full batches of one epoch after the other. The first one includes opening the data.

    Raises:
        Unsuitable: if no reader has enough rows for a batch.
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
    """Open the data, and return a function from the number of an epoch to its batches.

    Args:
        workers: processes of torch's ``DataLoader`` that each read a share of the windows; 0: this process reads. As
            usual for a ``DataLoader``, they start anew with each epoch; they run under the allocator that is set at
            that time. Their batches come in another order than those of one process.
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
            if is_out_of_memory(error):
                raise
            raise RuntimeError(_said_by_worker(error)) from None

    return batches


def _said_by_worker(error: Exception) -> str:
    """Return an error's message: that of a worker is the last line of the traceback sent with it."""
    last = str(error).strip().rpartition("\n")[2]
    return last.partition(": ")[2] if isinstance(error, Damaged) else last
