"""Files of fake tensors: what is saved is kept as it is, and what is loaded has the same shapes."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from membench.worker.breakdown import tensors_in
from membench.worker.storages import plain_tensors
from membench.worker.tracing.fake_modules import copied
from membench.worker.tracing.ledger import Ledger
from membench.worker.weights import kept_tensors


@contextlib.contextmanager
def filing_fake_tensors(ledger: Ledger) -> Iterator[None]:
    """Let ``torch.save`` and ``torch.load`` work on fake tensors, and tensors be pages of a mapped file.

    Such pages are no live memory, and the ledger does not count them. Nothing is written.
    """
    saved: dict[str, Any] = {}
    save, load, from_buffer = torch.save, torch.load, torch.frombuffer

    def keep(what: Any, file: Any, *rest: Any, **options: Any) -> None:
        if isinstance(file, str | os.PathLike):
            saved[os.fspath(file)] = what
        else:
            save(what, file, *rest, **options)

    def give(file: Any, *rest: Any, mmap: bool | None = None, **options: Any) -> Any:
        if not isinstance(file, str | os.PathLike) or os.fspath(file) not in saved:
            return load(file, *rest, mmap=mmap, **options)
        with ledger.aside():
            made = copied(saved[os.fspath(file)])
            for storage in _storages(made):
                if mmap:
                    ledger.lend(storage)
                else:
                    ledger.take(storage)
        return made

    def view(buffer: Any, *, dtype: torch.dtype, count: int = -1, offset: int = 0, **options: Any) -> torch.Tensor:
        if not isinstance(buffer, mmap.mmap):
            return from_buffer(buffer, dtype=dtype, count=count, offset=offset, **options)
        with ledger.aside():
            made = torch.empty((len(buffer) - offset) // dtype.itemsize if count < 0 else count, dtype=dtype)
            ledger.lend(made.untyped_storage())
        return made

    torch.save, torch.load, torch.frombuffer = keep, give, view  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save, torch.load, torch.frombuffer = save, load, from_buffer


def _storages(held: Any) -> Iterable[torch.UntypedStorage]:
    """Return the storages of a module or of a state dict, each once."""
    tensors = kept_tensors(held) if isinstance(held, nn.Module) else tensors_in(held)
    plain = (part for each in tensors for part in plain_tensors(each) if part.device.type != "meta")
    found: Mapping[int, torch.UntypedStorage] = {each._cdata: each for each in (one.untyped_storage() for one in plain)}
    return found.values()
