"""The stages of a case on fake tensors, and what is alive at each moment of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from membench import plugins
from membench.host.device import Device
from membench.protocol.readings import RankEstimate
from membench.protocol.requests import MeasureCase, Rank
from membench.worker import communication_memory
from membench.worker.assembly import Assembly
from membench.worker.breakdown import COMMUNICATION, tensors_in
from membench.worker.storages import plain_tensors
from membench.worker.tracing import allocation, disk, working_memory
from membench.worker.tracing.compiling import running_as_written
from membench.worker.tracing.fake_modules import converting_fake_modules, with_storage
from membench.worker.tracing.fake_ranks import alike, fake_ranks
from membench.worker.tracing.fake_samples import FakeSamples
from membench.worker.tracing.ledger import BETWEEN, Ledger, Span
from membench.worker.training import steps_for_memory
from membench.worker.weights import kept_tensors

_FIELDS = {
    "gradients": "gradients_bytes",
    "activations": "activations_bytes",
    "optimizer": "optimizer_state_bytes",
    "cache": "cache_bytes",
    COMMUNICATION: "communication_memory_bytes",
}
_PARTS = ("prefill", "decode", "forward", "backward", "optimizer")
"""Those whose peaks are figures."""
VALUES = "what depends on values: each one that was asked for was taken to be 1"
COMPILED = "what compilers keep, and the temporaries of code that is compiled"
SMALL = "Python's objects and what libraries set up: about 1 MiB, which counts in a peak this small"
_SMALL_BYTES = 2**24
BUILT_FROM_SHAPES = "what loading takes besides the weights: the model was made from its shapes"


def traced(case: MeasureCase, device: Device, threads: int | None, scratch: Path) -> Iterator[RankEstimate]:
    """Run a case on fake tensors on each rank that differs from the others.

    Args:
        device: where the case runs. Tensors are fake ones of a CPU in any case, since a build of torch for CPUs has no
            others with all their operations; sizes are those of the device's allocator.
        threads: with how many each rank would compute; ``None``: no kernel is run to see what it takes.
        scratch: the folder for what stages write.

    Raises:
        Exception: what a stage fails with on fake tensors.
        plugins.Unsuitable: if a technique cannot be applied to the case.
    """
    first = _assembly(case, device, 0, scratch, Ledger(FakeTensorMode(), allocation.size_on(device)))
    for ranks in alike(first.techniques, device.count) if device.in_ranks else [[0]]:
        yield _TracedRank(case, device, threads, ranks[0], scratch).estimate(ranks)


def _assembly(case: MeasureCase, device: Device, number: int, scratch: Path, ledger: Ledger) -> Assembly:
    on = device.ranks[number] if device.in_ranks else device
    rank = Rank(str(on), 1, number, device.count, None, device.in_ranks)
    assembly = Assembly.of(case, rank, scratch, ledger.part, contextlib.nullcontext)
    return dataclasses.replace(assembly, context=dataclasses.replace(assembly.context, device="cpu"))


def _with_fake_samples(case: Assembly) -> Assembly:
    samples = case.workload.samples()
    if samples is None:
        return case
    context = dataclasses.replace(case.context, samples=FakeSamples(samples.width, samples.classes))
    return dataclasses.replace(case, context=context)


class _TracedRank:
    """A rank of a case that runs on fake tensors."""

    def __init__(self, case: MeasureCase, device: Device, threads: int | None, number: int, scratch: Path) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._kernels = working_memory.of(device, threads)
        self._ledger = Ledger(self._fake, allocation.size_on(device), self._kernels.working_bytes)
        self._device, self._number = device, number
        self._case = _assembly(case, device, number, scratch, self._ledger)
        self._leaves_out: list[str] = []

    def estimate(self, ranks: Sequence[int]) -> RankEstimate:
        """Run all stages.

        Args:
            ranks: the numbers of those that it stands for.
        """
        with contextlib.ExitStack() as entered:
            if self._device.in_ranks:
                shared = self._case.context.scratch
                world = fake_ranks(self._case.techniques, self._number, self._device.count, shared)
                self._case = self._case.spread(entered.enter_context(world))
            entered.enter_context(converting_fake_modules())
            entered.enter_context(self._fake)
            compiled = entered.enter_context(running_as_written(self._ledger))
            self._rehearse()
            if compiled:
                self._leaves_out.append(COMPILED)
            entered.enter_context(self._ledger)
            return self._stages(ranks)

    def _rehearse(self) -> None:
        """Run what a measured case runs on a tiny model before its baseline: code that is compiled then is no growth.

        See ``rehearsing``; what it fails with there, too, leaves nothing behind that matters.
        """
        case = self._case.rehearsed()
        if case is None:
            return
        with contextlib.suppress(Exception), Ledger(self._fake, lambda size: size, self._kernels.working_bytes):
            module = case.load()
            for _, convert in case.conversions():
                module = convert(module)
            module.train(case.workload.trains)
            case = _with_fake_samples(case)
            case.workload.start(module, _zeros, case.techniques, case.context)()
        self._kernels.begin_at_baseline()

    def _stages(self, ranks: Sequence[int]) -> RankEstimate:
        ledger, figures = self._ledger, dict[str, int]()
        with self._phase() as loading:
            module = self._load()
        with self._phase() as applying:
            for _, convert in self._case.conversions():
                module = convert(module)
        module.train(self._case.workload.trains)
        self._case = _with_fake_samples(self._case)
        warmup, _ = steps_for_memory(self._case.techniques, in_ranks=self._device.in_ranks)
        with self._phase() as warming:
            step = self._case.workload.start(module, _zeros, self._case.techniques, self._case.context)
            for _ in range(warmup):
                step()
        with self._phase() as running:
            step()
        added = self._kernels.added_bytes()
        with self._phase() as saving:
            figures |= self._saved(module)
        figures["held_live_bytes"] = ledger.live_bytes + self._kernels.kept_bytes
        figures |= {
            "load_peak_live_bytes": loading.whole.bytes,
            "apply_peak_live_bytes": applying.whole.bytes,
            "warmup_peak_live_bytes": warming.whole.bytes,
            "peak_live_bytes": running.whole.bytes,
            "save_peak_live_bytes": saving.whole.bytes,
            "weights_bytes": self._bytes_of(kept_tensors(module)),
        }
        if self._case.workload.trains:
            trained = self._bytes_of(each for each in module.parameters() if each.requires_grad)
            figures |= {
                "trained_weights_bytes": trained,
                "frozen_weights_bytes": figures["weights_bytes"] - trained,
            }
        breakdown, held = self._breakdown(module, step, running)
        figures |= {_FIELDS[category]: size for category, size in held.items() if category in _FIELDS}
        parts = {name: peak for name, peak in running.parts.items() if name != BETWEEN}
        figures |= {f"{name}_peak_live_bytes": peak.bytes for name, peak in parts.items() if name in _PARTS}
        if running.whole.bytes < _SMALL_BYTES:
            self._leaves_out.append(SMALL)
        if ledger.answered:
            self._leaves_out.append(VALUES)
        return RankEstimate(
            ranks=ranks,
            how="traced",
            figures=figures,
            breakdown_bytes=breakdown,
            peak_part=max(parts, key=lambda name: parts[name].bytes, default=None),
            added_bytes=added,
            leaves_out=tuple(self._leaves_out),
        )

    @contextlib.contextmanager
    def _phase(self) -> Iterator[Span]:
        """Find the peaks of a phase, with what libraries hold during it."""
        self._kernels.begin()
        with self._ledger.span() as span:
            yield span
        span.add(sum(self._kernels.added_bytes().values()))

    def _saved(self, module: nn.Module) -> dict[str, int]:
        """Make what is saved as a checkpoint, and return its size; of what ranks share nothing is known here."""
        if self._device.in_ranks:
            return {}
        return {"disk_bytes": disk.checkpoint_bytes(module.state_dict())}

    def _load(self) -> nn.Module:
        case = self._case
        try:
            return case.load()
        except plugins.Unsuitable:
            raise
        except Exception:  # what reads files of weights cannot read them into fake tensors
            if any(each.applies_rest for each in case.techniques):
                raise  # it converts while it reads: of that the shapes say nothing
        self._leaves_out.append(BUILT_FROM_SHAPES)
        build: Callable[[], nn.Module] = lambda: with_storage(case.model.skeleton())  # noqa: E731
        for position, technique in enumerate(case.applied):
            with contextlib.suppress(Exception):
                return technique.load(build, case.techniques[position + 1 :], case.context)
        return build()

    def _bytes_of(self, tensors: Any) -> int:
        return sum(self._sizes_of(tensors).values())

    def _sizes_of(self, tensors: Any) -> dict[int, int]:
        """Return the bytes of the storages of tensors, by storage."""
        found = {}
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                storage = plain.untyped_storage()
                found[storage._cdata] = storage.nbytes()
        return found

    def _breakdown(
        self, module: nn.Module, step: plugins.Step, running: Span
    ) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
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
                highest[part] = held, self._sorted(module, saved)

        def look(at_end: bool) -> None:
            if at_end:
                sample()
                return
            name, known = wanted[self._ledger.operation], self._sorted(module, saved)
            found[name] = {**known, "other": parts[name].bytes - sum(known.values())}

        with (
            self._ledger.looking(look, frozenset(wanted)),
            torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack),
            self._sampling(module, sample),
        ):
            step()
        categories = {category for _, known in highest.values() for category in known}
        most = {category: max(known.get(category, 0) for _, known in highest.values()) for category in categories}
        return found, most

    @contextlib.contextmanager
    def _sampling(self, module: nn.Module, sample: Callable[..., None]) -> Iterator[None]:
        trained = [each for each in _parameters(module) if each.requires_grad and each.is_leaf]
        hooks = [each.register_post_accumulate_grad_hook(sample) for each in trained]  # type: ignore[no-untyped-call]
        if communication_memory.has_shards(module):
            layers = [layer for layer in module.modules() if communication_memory.has_shards(layer)]
            hooks += [layer.register_forward_hook(sample, prepend=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _sorted(self, module: nn.Module, saved: _Saved) -> dict[str, int]:
        counted: set[int] = set()

        def add(tensors: Any) -> int:
            new = {key: size for key, size in self._sizes_of(tensors).items() if key not in counted}
            counted.update(new)
            return sum(size for key, size in new.items() if key in self._ledger.sizes)

        inventory = self._case.context.inventory
        sorted_bytes = {"weights": add(kept_tensors(module))}
        sorted_bytes["gradients"] = add(each.grad for each in _parameters(module) if each.grad is not None)
        if communication_memory.has_shards(module):
            sorted_bytes[COMMUNICATION] = add(communication_memory.gathered_tensors(module))
        sorted_bytes["activations"] = add(saved.tensors())
        for category, holder in inventory.items():
            if category != COMMUNICATION:
                sorted_bytes[category] = add(tensors_in(holder()))
        return sorted_bytes


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


def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.long)
