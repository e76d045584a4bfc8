"""What is alive at the peak of each part of a step, by category, on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from membench.plugins import Step
from membench.worker import communication_memory
from membench.worker.breakdown import COMMUNICATION, tensors_in
from membench.worker.storages import plain_tensors
from membench.worker.tracing.ledger import BETWEEN, Ledger, Span
from membench.worker.weights import kept_tensors


class Breakdown:
    """Sorts what a ledger counts.

    Args:
        inventory: as in ``plugins.Context``.
    """

    def __init__(self, ledger: Ledger, inventory: Mapping[str, Callable[[], Any]], module: nn.Module) -> None:
        self._ledger, self._inventory, self._module = ledger, inventory, module

    def take(self, step: Step, running: Span) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
        """Take one more step, and sort what is alive at the peak of each part of it.

        Returns:
            that, and the most of each category where measuring looks for it: at the highest moment of each part among
            its end, gradients that are ready, and layers that have run before FSDP frees them.
        """
        started = self._ledger.operation
        saved = _Saved()
        found: dict[str, dict[str, int]] = {}
        parts = {name: peak for name, peak in running.parts.items() if name != BETWEEN}
        wanted = {peak.operation - running.began + started: name for name, peak in parts.items()}

        highest: dict[str, tuple[int, dict[str, int]]] = {}

        def sample(*_: Any) -> None:
            part, held = self._ledger.current_part, self._ledger.live_bytes
            if part != BETWEEN and (part not in highest or held > highest[part][0]):
                highest[part] = held, self._sorted(saved)

        def look(at_end: bool) -> None:
            if at_end:
                sample()
                return
            name = wanted[self._ledger.operation]
            if self._ledger.live_bytes > parts[name].bytes:
                return  # another moment than the peak: FSDP may take another number of operations than a step before
            known = self._sorted(saved)
            found[name] = {**known, "other": parts[name].bytes - sum(known.values())}

        with (
            self._ledger.looking(look, frozenset(wanted)),
            torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack),
            self._sampling(sample),
        ):
            step()
        categories = {category for _, known in highest.values() for category in known}
        most = {category: max(known.get(category, 0) for _, known in highest.values()) for category in categories}
        return found, most

    @contextlib.contextmanager
    def _sampling(self, sample: Callable[..., None]) -> Iterator[None]:
        trained = [each for each in _parameters(self._module) if each.requires_grad and each.is_leaf]
        hooks = [each.register_post_accumulate_grad_hook(sample) for each in trained]  # type: ignore[no-untyped-call]
        if communication_memory.has_shards(self._module):
            layers = [layer for layer in self._module.modules() if communication_memory.has_shards(layer)]
            hooks += [layer.register_forward_hook(sample, prepend=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _sorted(self, saved: _Saved) -> dict[str, int]:
        counted: set[int] = set()

        def add(tensors: Any) -> int:
            new = {key: size for key, size in _sizes_of(tensors).items() if key not in counted}
            counted.update(new)
            return sum(size for key, size in new.items() if key in self._ledger.sizes)

        sorted_bytes = {"weights": add(kept_tensors(self._module))}
        sorted_bytes["gradients"] = add(each.grad for each in _parameters(self._module) if each.grad is not None)
        if communication_memory.has_shards(self._module):
            sorted_bytes[COMMUNICATION] = add(communication_memory.gathered_tensors(self._module))
        sorted_bytes["activations"] = add(saved.tensors())
        for category, holder in self._inventory.items():
            if category != COMMUNICATION:
                sorted_bytes[category] = add(tensors_in(holder()))
        return sorted_bytes


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    return sum(_sizes_of(tensors).values())


def _sizes_of(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of the storages of tensors, by storage."""
    found = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose gradients the rank holds: FSDP's both gathered and as shards."""
    known = {
        id(each): each
        for each in (
            *module.parameters(),
            *communication_memory.gathered_parameters(module),
            *communication_memory.shards(module),
        )
    }
    return list(known.values())


class _Saved:
    """Tensors that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        return _SavedTensor(tensor, self._kept)

    def unpack(self, saved: Any) -> torch.Tensor:
        tensor: torch.Tensor = saved.tensor
        return tensor

    def tensors(self) -> list[torch.Tensor]:
        return list(self._kept.values())


class _SavedTensor:
    def __init__(self, tensor: torch.Tensor, kept: dict[int, torch.Tensor]) -> None:
        self.tensor, self._kept = tensor, kept
        kept[id(self)] = tensor

    def __del__(self) -> None:
        self._kept.pop(id(self), None)
