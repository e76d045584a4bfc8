"""The stages of a case on fake tensors, and what is alive at each moment of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from membench import plugins
from membench.errors import summary
from membench.host.device import Device
from membench.protocol.readings import FIELD_OF_CATEGORY, PARTS, RankEstimate
from membench.protocol.requests import MeasureCase, Rank
from membench.worker.assembly import Assembly
from membench.worker.breakdown import tensors_in
from membench.worker.storages import plain_tensors
from membench.worker.tracing import allocation, disk, unknown_shapes, working_memory
from membench.worker.tracing.alike_layers import converted_once
from membench.worker.tracing.breakdown import Breakdown, bytes_of
from membench.worker.tracing.compiling import running_as_written
from membench.worker.tracing.device_defaults import as_on
from membench.worker.tracing.fake_files import filing_fake_tensors
from membench.worker.tracing.fake_modules import converting_fake_modules, making_fake_subclasses, with_storage
from membench.worker.tracing.fake_ranks import alike, fake_ranks
from membench.worker.tracing.fake_samples import FakeSamples
from membench.worker.tracing.fake_sparse import multiplying_sparse_matrices
from membench.worker.tracing.ledger import BETWEEN, Ledger, Moment, Span
from membench.worker.training import steps_for_memory
from membench.worker.weights import kept_tensors

VALUES = "what depends on values: each one that was asked for was taken to be 1"
COMPILED = "what compilers keep, and the temporaries of code that is compiled"
SPARSE = "how many numbers of each matrix are not zero: it was taken to be the share that techniques name"
SMALL = "Python's objects and what libraries set up, up to 1 MiB: much of so small a peak, read to within 0.25 MiB"
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
    first = assembly(case, device, 0, scratch)
    for ranks in alike(first.techniques, device.count) if device.in_ranks else [[0]]:
        yield TracedRank(case, device, threads, ranks[0], scratch).estimate(ranks)


def untraceable(error: Exception) -> str:
    """Return why a case cannot be traced that ended in an error."""
    return f"it cannot be estimated: on fake tensors it ends in {summary(error)}"


def assembly(
    case: MeasureCase,
    device: Device,
    number: int,
    scratch: Path,
    ledger: Ledger | None = None,
    layers: int | None = None,
) -> Assembly:
    """Return a case on one of its ranks, with fake tensors' device.

    Args:
        layers: how many layers its model is to have; ``None``: all.
    """
    on = device.ranks[number] if device.in_ranks else device
    rank = Rank(str(on), 1, number, device.count, None, device.in_ranks)
    part: Callable[[str], Any] = ledger.part if ledger else lambda _: contextlib.nullcontext()
    made = Assembly.of(case, rank, scratch, part, contextlib.nullcontext)
    model = made.model if layers is None else made.model.with_depth(layers)
    return dataclasses.replace(made, model=model, context=dataclasses.replace(made.context, device="cpu", model=model))


def _with_fake_samples(case: Assembly) -> Assembly:
    samples = case.workload.samples()
    if samples is None:
        return case
    context = dataclasses.replace(case.context, samples=FakeSamples(samples.width, samples.classes))
    return dataclasses.replace(case, context=context)


class TracedRank:
    """A rank of a case that runs on fake tensors.

    Args:
        layers: how many layers its model is to have; ``None``: all.
    """

    def __init__(
        self,
        case: MeasureCase,
        device: Device,
        threads: int | None,
        number: int,
        scratch: Path,
        layers: int | None = None,
    ) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._kernels = working_memory.of(device, threads)
        self._ledger = Ledger(self._fake, allocation.size_on(device), self._kernels.working_bytes)
        self._device, self._number = device, number
        self._case = assembly(case, device, number, scratch, self._ledger, layers)
        self._leaves_out: list[str] = []
        self.module: nn.Module | None = None
        """The module of the estimated case."""

    def estimate(self, ranks: Sequence[int]) -> RankEstimate:
        """Run all stages.

        Args:
            ranks: the numbers of those that it stands for.
        """
        with self._world() as compiled:
            self._rehearse()
            if compiled:
                self._leaves_out.append(COMPILED)
            with self._ledger:
                return self._stages(ranks)

    def step(self) -> tuple[dict[str, int], list[Moment]]:
        """Run the stages up to one step after the first, and no others.

        Returns:
            figures that grow with each layer by the same amount, by metric field; and the moments of the step, with all
            that is alive, libraries' memory included.
        """
        with self._world(), self._ledger:
            module = self._ready()
            with self._phase(), self._ledger.recording() as moments:
                step = self._case.workload.start(module, _zeros, self._case.techniques, self._case.context)
                step()
                gc.collect()
                moments.clear()
                step()
            figures = self._weights(module)
            if self._case.workload.trains:
                gradients = (each.grad for each in module.parameters() if each.grad is not None)
                figures["gradients_bytes"] = bytes_of(gradients)
            if (states := self._case.context.inventory.get("optimizer")) is not None:
                figures["optimizer_state_bytes"] = bytes_of(tensors_in(states()))
            added = sum(self._kernels.added_bytes().values())
            return figures, [dataclasses.replace(each, live_bytes=each.live_bytes + added) for each in moments]

    @contextlib.contextmanager
    def _world(self) -> Iterator[list[str]]:
        """Be the rank, with fake tensors; yields what ``running_as_written`` does."""
        with contextlib.ExitStack() as entered:
            if self._device.in_ranks:
                shared = self._case.context.scratch
                world = fake_ranks(self._case.techniques, self._number, self._device.count, shared, self._ledger)
                self._case = self._case.spread(entered.enter_context(world))
            entered.enter_context(converting_fake_modules())
            entered.enter_context(converted_once(self._case.techniques, self._ledger))
            entered.enter_context(making_fake_subclasses())
            entered.enter_context(unknown_shapes.given_to_libraries(self._ledger.note_unknown_shape))
            share = math.prod(_share_left(each) for each in self._case.techniques)
            entered.enter_context(multiplying_sparse_matrices(share, self._note_sparse))
            entered.enter_context(filing_fake_tensors(self._ledger))
            entered.enter_context(as_on(self._device))
            entered.enter_context(self._fake)
            compiled = entered.enter_context(running_as_written(self._ledger))
            self._prepare(self._case)
            yield compiled

    def _note_sparse(self) -> None:
        if SPARSE not in self._leaves_out:
            self._leaves_out.append(SPARSE)

    def _ready(self) -> nn.Module:
        """Return the module as its steps use it."""
        return self._set_up(_converted(self._case, self._load(self._case)))

    def _set_up(self, module: nn.Module) -> nn.Module:
        """Bring a converted module, and what it is fed with, into the state in which steps begin."""
        module.train(self._case.workload.trains)
        self._own_what_is_trained(module)
        self._case = _with_fake_samples(self._case)
        return module

    def _own_what_is_trained(self, module: nn.Module) -> None:
        """Count weights that are written to: they are pages of a file no more."""
        if self._case.workload.trains:
            for plain in (part for each in module.parameters() if each.requires_grad for part in plain_tensors(each)):
                self._ledger.take(plain.untyped_storage())

    def _rehearse(self) -> None:
        """Run what a measured case runs on a tiny model before its baseline: code that is compiled then is no growth.

        See ``rehearsing``; what it fails with there, too, leaves nothing behind that matters.
        """
        case = self._case.rehearsed()
        if case is None:
            return
        with contextlib.suppress(Exception), Ledger(self._fake, lambda size: size, self._kernels.working_bytes):
            self._prepare(case)
            module = _converted(case, case.load())
            module.train(case.workload.trains)
            case = _with_fake_samples(case)
            case.workload.start(module, _zeros, case.techniques, case.context)()
        self._kernels.begin_at_baseline()

    def _prepare(self, case: Assembly) -> None:
        """Prepare the files that members load, from fake tensors; what that takes is in no figure."""
        with Ledger(self._fake, lambda size: size):
            for position, technique in reversed(list(enumerate(case.techniques))):
                kind, plain = type(technique), plugins.Technique
                if kind.prepare is plain.prepare or kind.load is plain.load:
                    continue
                rest = case.techniques[position + 1 :] if technique.prepares_rest else ()
                technique.prepare(functools.partial(self._made, case, rest), case.context)

    def _made(self, case: Assembly, techniques: Sequence[plugins.Technique]) -> nn.Module:
        module = self._load(dataclasses.replace(case, techniques=()))
        return _converted(dataclasses.replace(case, techniques=tuple(techniques)), module)

    def _stages(self, ranks: Sequence[int]) -> RankEstimate:
        ledger, figures = self._ledger, dict[str, int]()
        with self._phase() as loading:
            module = self._load(self._case)
        with self._phase() as applying:
            module = _converted(self._case, module)
        self.module = self._set_up(module)
        warmup, _ = steps_for_memory(self._case.techniques, in_ranks=self._device.in_ranks)
        with self._phase() as warming:
            step = self._case.workload.start(module, _zeros, self._case.techniques, self._case.context)
            for _ in range(warmup):
                step()
        with self._phase() as running:
            step()
        added = self._kernels.added_bytes()
        figures["held_live_bytes"] = ledger.live_bytes + self._kernels.kept_bytes
        figures |= {
            "load_peak_live_bytes": loading.whole.bytes,
            "apply_peak_live_bytes": applying.whole.bytes,
            "warmup_peak_live_bytes": warming.whole.bytes,
            "peak_live_bytes": running.whole.bytes,
            **self._weights(module),
        }
        breakdown, held = Breakdown(ledger, self._case.context.inventory, module).take(step, running)
        figures |= {FIELD_OF_CATEGORY[each]: size for each, size in held.items() if each in FIELD_OF_CATEGORY}
        with self._phase() as saving:
            figures |= self._saved(module)
        figures["save_peak_live_bytes"] = saving.whole.bytes
        parts = {name: peak for name, peak in running.parts.items() if name != BETWEEN}
        figures |= {f"{name}_peak_live_bytes": peak.bytes for name, peak in parts.items() if name in PARTS}
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

    def _weights(self, module: nn.Module) -> dict[str, int]:
        """Return the figures of the weights, by metric field."""
        weights = bytes_of(kept_tensors(module))
        if not self._case.workload.trains:
            return {"weights_bytes": weights}
        trained = bytes_of(each for each in module.parameters() if each.requires_grad)
        return {
            "weights_bytes": weights,
            "trained_weights_bytes": trained,
            "frozen_weights_bytes": weights - trained,
        }

    @contextlib.contextmanager
    def _phase(self) -> Iterator[Span]:
        """Find the peaks of a phase, with what libraries hold during it."""
        self._kernels.begin()
        gc.collect()  # as at each phase of a measured process
        with self._ledger.span() as span:
            yield span
        span.add(sum(self._kernels.added_bytes().values()))

    def _saved(self, module: nn.Module) -> dict[str, int]:
        """Make what is saved as a checkpoint, and return its size; of what ranks share nothing is known here."""
        if self._device.in_ranks:
            return {}
        return {"disk_bytes": disk.checkpoint_bytes(module.state_dict())}

    def _load(self, case: Assembly) -> nn.Module:
        try:
            return case.load()
        except plugins.Unsuitable:
            raise
        except Exception:  # what reads files of weights cannot read them into fake tensors
            if any(each.applies_rest for each in case.techniques):
                raise  # it converts while it reads: of that the shapes say nothing
        if BUILT_FROM_SHAPES not in self._leaves_out:
            self._leaves_out.append(BUILT_FROM_SHAPES)
        build: Callable[[], nn.Module] = lambda: with_storage(case.model.skeleton())  # noqa: E731
        for position, technique in enumerate(case.applied):
            with contextlib.suppress(Exception):
                return technique.load(build, case.techniques[position + 1 :], case.context)
        module = build()
        rest_of = [case.techniques[position + 1 :] for position in range(len(case.applied))]
        loading = [each.loading_bytes(1, rest) for each, rest in zip(case.applied, rest_of, strict=True)]
        if 0 in loading and not case.workload.trains:  # weights that are written to are pages of the file no more
            self._ledger.leave_out(module.parameters())
        return module


def _converted(case: Assembly, module: nn.Module) -> nn.Module:
    for _, convert in case.conversions():
        module = convert(module)
    return module


def _share_left(technique: plugins.Technique) -> float:
    share = None if isinstance(technique, plugins.Parallel) else technique.nominal_share()
    return 1.0 if share is None else share


def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.long)
