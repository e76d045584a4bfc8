"""The memory breakdown: bytes by category at the peak of a step, found by walking storages of tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from membench.protocol.readings import PartReading
from membench.worker import communication_memory
from membench.worker.communication_memory import OutOfReach
from membench.worker.storages import Storages, key_of, plain_tensors, storages
from membench.worker.weights import kept_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

_DEEPEST = 8
COMMUNICATION = "communication"
"""The category of what a rank holds for collectives; a technique that knows of such memory registers a holder of it."""


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


@dataclass
class _Saved:
    """A tensor that autograd keeps for the backward pass. It notifies the watcher when autograd releases it."""

    tensor: torch.Tensor
    watcher: MemoryWatcher
    keys: list[int]

    def __del__(self) -> None:
        for key in self.keys:
            self.watcher.release(key)


@dataclass
class _Kept:
    """A storage that autograd keeps: how often, and where it is. What fills it may empty it meanwhile, as FSDP does."""

    storage: torch.UntypedStorage
    device: str
    count: int = 0


class MemoryWatcher:
    """Watches one step and keeps the memory breakdown at the peak of each of its parts.

    It samples at the end of each part of the step and whenever a gradient is ready; under FSDP also when a layer has
    run, before its gathered weights are freed. What is allocated and freed between two samples is in no category.

    Args:
        module: the model.
        inventory: for each category (optimizer states, key-value cache, communication), a function that returns the
            object that holds its tensors.
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
        self._saved: dict[int, _Kept] = {}
        self._has_shards = communication_memory.has_shards(module)
        self._inventory.get(COMMUNICATION, tuple)()  # gradients of the step before show where DDP's buckets are
        self._part = part
        self._highest: dict[str | None, tuple[int, dict[str, int]]] = {}

    def release(self, key: int) -> None:
        """Count one reference less to a storage that autograd keeps."""
        entry = self._saved[key]
        entry.count -= 1
        if not entry.count:
            del self._saved[key]

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        if type(tensor).__name__ not in ("Tensor", "Parameter", "DTensor", "AsyncCollectiveTensor"):
            return tensor
        keys = []
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            if key_of(plain) not in self._weights:
                key = storage._cdata
                self._saved.setdefault(key, _Kept(storage, str(plain.device))).count += 1
                keys.append(key)
        return _Saved(tensor, self, keys) if keys else tensor

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    def sample(self, *_: Any) -> None:
        """Keep the current breakdown if live memory is the highest so far in this part."""
        held, part = self._held_bytes(), self._part()
        if part in self._highest and held <= self._highest[part][0]:
            return
        self._highest[part] = (held, self._sizes(self._weight_ranges.copy()))

    def _sizes(self, counted: Storages) -> dict[str, int]:
        """Return the bytes that are held now by category; those of the first that has them.

        Args:
            counted: the weights.
        """
        found = {
            "weights": counted.bytes,
            "gradients": sum(counted.add(p.grad) for p in self._parameters() if p.grad is not None),
        }
        if self._has_shards or COMMUNICATION in self._inventory:
            held = self._inventory.get(COMMUNICATION, tuple)()
            tensors = (*communication_memory.gathered_tensors(self._module), *tensors_in(held))
            found[COMMUNICATION] = sum(counted.add(tensor) for tensor in tensors) + _out_of_reach(held, counted)
        kept = self._saved.values()
        found["activations"] = sum(
            counted.cover(each.device, each.storage.data_ptr(), each.storage.nbytes()) for each in kept
        )  # fmt: skip
        for category, holder in self._inventory.items():
            if category != COMMUNICATION:
                found[category] = sum(counted.add(tensor) for tensor in tensors_in(holder()))
        return found

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters whose gradients the rank holds: FSDP's both gathered and as shards."""
        yield from self._module.parameters()
        yield from communication_memory.gathered_parameters(self._module)
        yield from communication_memory.shards(self._module)

    def _after_layer(self, *_: Any) -> None:
        """Sample before the hook that frees what FSDP has gathered for a layer."""
        self.sample()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the step that runs in this context."""
        import torch

        parameters = {id(p): p for p in self._parameters() if p.requires_grad and p.is_leaf}
        hooks = [p.register_post_accumulate_grad_hook(self.sample) for p in parameters.values()]
        if self._has_shards:
            layers = [layer for layer in self._module.modules() if communication_memory.has_shards(layer)]
            hooks += [layer.register_forward_hook(self._after_layer, prepend=True) for layer in layers]
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


def _out_of_reach(held: Any, counted: Storages) -> int:
    """Return the bytes that holders name without a tensor and that are not counted yet."""
    named = held if isinstance(held, list | tuple) else (held,)
    found = [each for each in named if isinstance(each, OutOfReach)]
    ranges = sum(counted.cover(*known) for each in found for known in each.ranges)
    return ranges + sum(each.bytes for each in found)


def live_peaks(parts: Mapping[str, PartReading]) -> dict[str, int]:
    """Return the live peak of each part of a step, where it was measured."""
    return {
        name: peak_bytes
        for name, part in parts.items()
        if name != "between" and (peak_bytes := part.live_peak_bytes) is not None
    }
