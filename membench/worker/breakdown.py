"""The memory breakdown: bytes by category at the peak of a step, found by walking storages of tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from membench.protocol.readings import PartReading
from membench.worker.storages import Storages, plain_tensors
from membench.worker.weights import kept_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

_DEEPEST = 8


def tensors_in(held: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in an object: in its attributes, and in lists, tuples and mappings, to a depth of eight."""
    return (tensor for _, tensor in named_tensors_in(held))


def named_tensors_in(held: Any, name: str = "", depth: int = _DEEPEST) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors in an object like ``tensors_in``, each with the name of its attribute or its key."""
    import torch

    if isinstance(held, torch.Tensor):
        yield name, held
    elif isinstance(held, Mapping):
        for key, value in held.items():
            yield from named_tensors_in(value, str(key), depth)
    elif isinstance(held, list | tuple | set):
        for value in held:
            yield from named_tensors_in(value, name, depth)
    elif hasattr(held, "__dict__") and depth and not isinstance(held, type):
        for key, value in vars(held).items():
            yield from named_tensors_in(value, key, depth - 1)


def storages(tensors: Iterable[torch.Tensor]) -> dict[tuple[str, int], int]:
    """Return the bytes of each storage of tensors, by device and address; quantized tensors are opened."""
    found: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        # Not detached first: a detached copy may own inner tensors, which would be freed before they are counted.
        for plain in plain_tensors(tensor):
            if plain.device.type != "meta":
                storage = plain.untyped_storage()
                found[(str(plain.device), storage.data_ptr())] = storage.nbytes()
    return found


@dataclass
class _Saved:
    """A tensor that autograd keeps for the backward pass. It notifies the watcher when autograd releases it."""

    tensor: torch.Tensor
    watcher: MemoryWatcher
    key: tuple[str, int]

    def __del__(self) -> None:
        self.watcher.release(self.key)


class MemoryWatcher:
    """Watches one step and keeps the memory breakdown at the peak of each of its parts.

    It samples at the end of each part of the step and whenever a gradient is ready. Memory that is allocated and freed
    between two samples is in no category.

    Args:
        module: the model.
        inventory: for each category (optimizer states, key-value cache), a function that returns the object that holds
            its tensors.
        held_bytes: returns the current live memory above the baseline.
        part: returns the current part of the step; ``None`` between parts.
    """

    def __init__(
        self,
        module: nn.Module,
        inventory: Mapping[str, Callable[[], Any]],
        held_bytes: Callable[[], int],
        part: Callable[[], str | None],
    ) -> None:
        self._module = module
        self._inventory = inventory
        self._held_bytes = held_bytes
        weights = list(kept_tensors(module))
        self._weights, self._weight_ranges = storages(weights), Storages(weights)
        self._saved: dict[tuple[str, int], list[int]] = {}
        self._part = part
        self._highest: dict[str | None, tuple[int, dict[str, int]]] = {}

    def release(self, key: tuple[str, int]) -> None:
        """Count one reference less to a storage that autograd keeps."""
        entry = self._saved[key]
        entry[0] -= 1
        if not entry[0]:
            del self._saved[key]

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        if type(tensor).__name__ not in ("Tensor", "Parameter"):
            return tensor
        storage = tensor.untyped_storage()
        key = (str(tensor.device), storage.data_ptr())
        if key in self._weights:
            return tensor
        self._saved.setdefault(key, [0, storage.nbytes()])[0] += 1
        return _Saved(tensor, self, key)

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    def sample(self, *_: Any) -> None:
        """Keep the current breakdown if live memory is the highest so far in this part."""
        held, part = self._held_bytes(), self._part()
        if part in self._highest and held <= self._highest[part][0]:
            return
        counted = self._weight_ranges.copy()
        found = {
            "weights": counted.bytes,
            "gradients": sum(counted.add(p.grad) for p in self._module.parameters() if p.grad is not None),
            "activations": sum(counted.cover(*key, size) for key, (_, size) in self._saved.items()),
        }
        for category, holder in self._inventory.items():
            found[category] = sum(counted.add(tensor) for tensor in tensors_in(holder()))
        self._highest[part] = (held, found)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the step that runs in this context."""
        import torch

        hooks = [
            p.register_post_accumulate_grad_hook(self.sample) for p in self._module.parameters() if p.requires_grad
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
            self.sample()
        finally:
            for hook in hooks:
                hook.remove()

    def breakdown(self, peaks: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Return the bytes by part of the step and category, at the part's peak.

        The category ``other`` is the rest of the live peak: temporaries, buffers of libraries and small objects.

        Args:
            peaks: the exact live peaks of the parts, in bytes, where they are known.
        """
        return {
            part: {**found, "other": peaks.get(part, held) - sum(found.values())}
            for part, (held, found) in self._highest.items()
            if part is not None
        }


def live_peaks(parts: Mapping[str, PartReading]) -> dict[str, int]:
    """Return the live peak of each part of a step, where it was measured."""
    return {
        name: peak_bytes
        for name, part in parts.items()
        if name != "between" and (peak_bytes := part.live_peak_bytes) is not None
    }
