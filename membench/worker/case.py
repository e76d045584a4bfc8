"""Measurement of a case, phase by phase.

Live memory is measured in ``load``, ``apply``, ``store``, ``warmup``, ``run``, ``breakdown`` and ``save`` under the
pinned allocator. ``communication`` counts what ranks hand to collectives. ``time`` runs further steps under the default
allocator, to measure durations and the footprint that a user's process would have. ``finish`` runs the remaining steps
of a workload that has a fixed number of steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from membench import plugins
from membench.host import import_guard
from membench.protocol.messages import CustomFigure, Result, ResultSoFar
from membench.protocol.readings import QualityReading
from membench.protocol.requests import MeasureCase, Rank
from membench.units import LARGEST_VALUE
from membench.worker import allocator, breakdown, checkpoint, device, notes, output_check, plugin_values, quality
from membench.worker.agreement import on_any
from membench.worker.assembly import Assembly
from membench.worker.communication import Sleeping, communicated_bytes
from membench.worker.communication_memory import free_gathered
from membench.worker.converted_layers import explaining, remarks
from membench.worker.fitting import find_near_memory, refuse_what_cannot_load
from membench.worker.garbage import note_on_garbage
from membench.worker.kernels import Kernels
from membench.worker.meter import Meter
from membench.worker.numpy_threads import set_numpy_threads
from membench.worker.process_group import join, refuse_without_ranks, rehearse_collectives
from membench.worker.rehearsing import rehearse
from membench.worker.timed_steps import TimedSteps
from membench.worker.training import figures_of_training, note_on_more_steps, steps_for_memory
from membench.worker.waiting import Waiting
from membench.worker.weights import bytes_by_module, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

_V = TypeVar("_V")


class Diverged(Exception):
    """A training whose loss became non-finite. All measurements remain valid.

    Attributes:
        phase: the phase in which it happened; ``None``: while a technique prepared its files.
    """

    def __init__(self, phase: str | None, message: str) -> None:
        super().__init__(message)
        self.phase = phase


def measure(request: MeasureCase, rank: Rank, scratch: Path, meter: Meter) -> None:
    """Measure a case, phase by phase. Results are sent before each phase that may fail.

    Raises:
        Diverged: after all phases, if a training diverged.
        InvalidValue: after all phases, if a plug-in returned a value that no record can hold.
    """
    work = _Work(request, rank, scratch, meter)
    module = work.load_and_apply(work.prepare())
    _refuse_other_checkout(request)
    work.store(module)
    step = work.run_for_memory(module)
    work.save(module)  # with the optimizer, as a training saves, and before the default allocator leaves holes
    work.run_for_time(step)
    work.finish(module, step)
    del step  # it refers to the optimizer, which is freed with it
    work.case.context.inventory.clear()
    work.evaluate(module)
    _refuse_other_checkout(request)
    if work.invalid:
        raise plugin_values.InvalidValue("; ".join(work.invalid))
    if work.diverged is not None:
        raise work.diverged


def _refuse_other_checkout(request: MeasureCase) -> None:
    if request.checkouts:
        import_guard.refuse_imported(Path(request.checkouts.other), Path(request.checkouts.own))


class _Work:
    """A case that is being measured, with its result so far."""

    def __init__(self, request: MeasureCase, rank: Rank, scratch: Path, meter: Meter) -> None:
        self.case = Assembly.of(request, rank, scratch, meter.part, meter.aside)
        self.losses: list[float] = []
        self._steps = 0
        self.invalid: list[str] = []  # of each field once
        self.diverged: Diverged | None = None
        self._request, self._rank, self._scratch, self._meter = request, rank, scratch, meter
        self._waiting = Waiting(rank.threads)
        self._timed = TimedSteps(meter, self._waiting, rank.threads, request.steps.calm_within_s)
        self._remarks: list[str] = []
        self._notes: list[str] = []
        self._result = Result(pinned=False, is_trained=bool(self.case.model.quality))

    def _update_result(self, **known: Any) -> None:
        """Set fields of the result."""
        self._result = replace(self._result, **known)

    def _valid(self, field: str, check: Callable[[], _V], owner: object = None) -> _V | None:
        """Return a value of a plug-in; ``None`` if no record can hold it, which is reported at the end of the case."""
        try:
            return check()
        except plugin_values.InvalidValue as error:
            problem = f"{self.case.name_of(owner)}: {field} = {error}"
            if not any(known.startswith(problem.partition(" = ")[0]) for known in self.invalid):
                self.invalid.append(problem)
            return None

    def prepare(self) -> notes.PlainWeights | None:
        """Do everything that must not be measured, and take the baseline.

        Returns:
            the size of the weights as built, if a technique converts them while loading and it is known.
        """
        import torch

        case, where = self.case, self._rank.device
        refuse_without_ranks(self._rank, case.techniques)
        if self._meter.on_gpu:
            device.refuse_missing(where)
        self._kernels = Kernels(self._request, where, self._scratch)
        # Threads do not survive the forks below: one that this process had started would be waited for forever there.
        torch.set_num_threads(1)
        # Without pinning, the text leaves holes in the heap, and allocations that fill these would count as growth.
        allocator.pin()
        output_check.refuse_wrong_output(case.workload, case.context, case.model_name)
        case.read_text()
        self._update_result(corpus=case.digest())
        allocator.unpin()
        case = self.case = case.watched()
        case.prepare(self._rank.of)
        self._update_result(pinned=allocator.pin())
        torch.set_num_threads(self._rank.threads)
        set_numpy_threads(self._rank.blas_threads)
        refuse_what_cannot_load(case.model, case.techniques, where, self._rank.of)
        if self._request.asks_for_estimate:
            find_near_memory(case.model, case.workload, where, self._rank.of)
        if self._rank.is_one_of_several:
            case = self.case = case.spread(join(self._rank, case.techniques, self._scratch.parent))
            rehearse_collectives(where)
        self._waiting.be_passive()
        failed = self._kernels.used_by(functools.partial(rehearse, case), case.context.ranks)
        self._notes += self._kernels.notes
        if failed is not None:
            self._notes.append(f"what libraries set up once is in the figures: {failed}")
        self._waiting.be_passive()  # in the libraries, too, that were loaded meanwhile
        if self._meter.on_gpu:
            device.announce_gpu(self._meter, where)
        converted = any(technique.applies_rest for technique in case.techniques)
        plain = case.plain_weights() if converted else None
        if case.context.diverged:
            self.diverged = Diverged(None, case.context.diverged[0])  # it diverged in the preparing process
        torch.manual_seed(self._request.seed)  # the first time it imports modules, which belong to the baseline
        self._meter.set_baseline()
        return plain

    def load_and_apply(self, plain: notes.PlainWeights | None) -> nn.Module:
        """Run the phases ``load`` and ``apply``.

        Args:
            plain: the size of the weights as built, if a technique converts them while loading.
        """
        with self._meter.phase("load", "pinned"):
            self._meter.memory_in_parts = True
            module = self.case.load()
            self._meter.memory_in_parts = False
        converted = any(technique.applies_rest for technique in self.case.techniques)
        self._plain = plain if converted else notes.PlainWeights.of(module)
        with self._meter.phase("apply", "pinned"):
            module = self.case.apply(module)
        self._remarks += remarks(self.case.names, self.case.techniques, self.case.context)
        if self.case.context.diverged and self.diverged is None:
            self.diverged = Diverged(self._meter.current_phase, self.case.context.diverged[0])
        module.train(self.case.workload.trains)
        return module

    def store(self, module: nn.Module) -> None:
        """Run the phase ``store``, if the workload reads a corpus or trains on samples."""
        if self.case.workload.corpus() is None and self.case.workload.samples() is None:
            return
        with self._meter.phase("store", "pinned"):
            self._meter.memory_in_parts = True
            self.case = self.case.store(module)
            self._meter.memory_in_parts = False

    def _add_loss(self, loss: torch.Tensor | None) -> None:
        self._steps += 1
        if loss is None:
            return
        item: object = loss.item() if hasattr(loss, "item") else loss
        known = self._valid("the loss of a step", lambda: plugin_values.loss(item), self.case.workload)
        self.losses.append(math.nan if known is None else known)
        if known is None:
            return
        if self.diverged is None and not math.isfinite(self.losses[-1]):
            message = f"the training loss became {self.losses[-1]} in step {len(self.losses)}"
            self.diverged = Diverged(self._meter.current_phase, message)

    def run_for_memory(self, module: nn.Module) -> plugins.Step:
        """Run the phases ``warmup``, ``run`` and ``breakdown`` under the pinned allocator.

        Returns:
            the workload's step, for the later phases.
        """
        case, meter = self.case, self._meter
        compiled_before = self._kernels.count()
        in_ranks = case.context.ranks is not None
        warmup, measured = steps_for_memory(case.techniques, in_ranks=in_ranks)
        with meter.phase("warmup", "pinned"):
            step = case.workload.start(module, case.tokens(module), case.techniques, case.context)
            with explaining(module, case.names, case.techniques):
                for _ in range(warmup):
                    self._add_loss(step())
        if compiled := self._kernels.count() - compiled_before:
            self._notes.append(f"the first step compiled kernels, none of them from a cache (libraries: {compiled})")
        if case.workload.trains:
            self._update_result(**figures_of_training(module, case.techniques))
            self._notes += note_on_more_steps(case.names, case.techniques, in_ranks=in_ranks)
        with meter.phase("run", "pinned") as run:
            meter.memory_in_parts = True
            for _ in range(measured):
                meter.separate_step()
                self._add_loss(step())
            meter.memory_in_parts = False
        free_gathered(module)
        # Weights are counted after the steps, because some libraries repack them in the first forward pass.
        self._update_result(weights_bytes=weight_bytes(module), modules_bytes=bytes_by_module(module))
        self._notes += case.notes_on_text(module)
        assert run.reading is not None, "the phase has ended"
        self._notes += note_on_garbage(meter.most_garbage_bytes, run.reading.live_peak_bytes)
        self._notes += notes.on_weights_and_states(module, case.context, case.techniques, self._plain)
        if case.context.inventory:
            with meter.phase("breakdown", "pinned"):
                watcher = breakdown.MemoryWatcher(
                    module, case.context.inventory, meter.held_live_bytes, lambda: meter.current_part
                )
                cache_notes: list[str] = []

                def sample() -> None:
                    watcher.sample()
                    # The cache is full at the last sample.
                    cache_notes[:] = notes.on_cache_of(case.context, case.workload, case.techniques, self._built_bits)

                with watcher.watching(), meter.sampling_parts(sample):
                    self._add_loss(step())
            self._notes += cache_notes
            known = meter.on_gpu or self._result.pinned
            peaks = breakdown.live_peaks(run.peaks_of_parts()) if known else {}
            self._update_result(
                breakdown_bytes=watcher.breakdown(peaks),
                peak_part=max(peaks, key=lambda part: peaks[part], default=None),
            )
        if in_ranks:
            with meter.phase("communication", "pinned"):
                loss, communicated = communicated_bytes(step, after_another=not case.workload.trains)
                self._add_loss(loss)
            self._update_result(communicated_bytes=communicated)
        for name, technique in zip(case.names, case.techniques, strict=True):
            if remark := technique.remark(module, case.context):
                self._remarks.append(f"'{name}' {remark}")
        return step

    @property
    def _built_bits(self) -> float:
        return 32 if self._plain is None else self._plain.bits

    def run_for_time(self, step: plugins.Step) -> None:
        """Run the phase ``time`` under the default allocator, with threads that wait as in a user's process."""
        meter, steps, timed_steps = self._meter, self._request.steps, self._timed
        # The losses of a training, and what its model learns, depend on the number of steps.
        can_repeat = not self.case.workload.trains and self.case.workload.steps_in_all() is None
        can_repeat = can_repeat and not self.case.context.ranks  # which must all take the same number of steps
        sleeping = Sleeping() if self.case.context.ranks and not meter.on_gpu else None
        allocator.unpin()
        data = self.case.context.data
        codec_speeds: list[float] = []

        def time_codec() -> None:
            if data is not None and self._bytes_of_an_epoch() is not None:
                codec_speeds.extend(data.codec_speeds())

        with timed_steps.phase(time_codec) as timed:
            for _ in range(steps.warmup):
                self._add_loss(step())
            meter.parts.clear()
            timed_step = step if sleeping is None else sleeping.watched(step)
            meet = functools.partial(on_any, self.case.context.ranks, False)
            for loss in timed_steps.measure(timed_step, steps.measured, can_repeat=can_repeat, meet=meet):
                self._add_loss(loss)
            timed.steps = steps.warmup + len(timed_steps.durations_s)
        if data is not None:
            # Opening and the codec are timed under the same allocator as the steps.
            self.case.context.facts.update(data.timed_afresh(codec_speeds))
        allocator.pin()
        self._waiting.be_passive()
        self._update_result(
            **timed_steps.result(),
            slept_s=None if sleeping is None else sleeping.slept_s,
            losses_nats=self._losses_nats(),
            tokens_per_step=self._count("tokens_per_step") or self._tokens_of_an_epoch(),
            epoch_bytes=self._bytes_of_an_epoch(),
            decoded_tokens=self._count("decoded_tokens_per_step"),
        )
        self._send_result()

    def _count(self, method: str) -> float | None:
        """Return a number of tokens as the workload reports it."""
        workload = self.case.workload
        return self._valid(f"{method}()", lambda: plugin_values.count(getattr(workload, method)()), workload)

    def _losses_nats(self) -> list[float | None]:
        return [loss if abs(loss) <= LARGEST_VALUE else None for loss in self.losses]

    def finish(self, module: nn.Module, step: plugins.Step) -> None:
        """Run the phase ``finish``, if the workload has a fixed number of steps: the remaining ones and its result."""
        case, all_steps = self.case, self.case.workload.steps_in_all()
        if all_steps is None:
            return
        allocator.unpin()  # no memory is measured here, and the default allocator is faster
        with self._meter.phase("finish", "default"):
            # A rank may have no loss, as a stage of a pipeline, and all must stop where one diverges.
            while self._steps < all_steps and not on_any(case.context.ranks, self.diverged is not None):
                self._add_loss(step())
                self._meter.parts.clear()
            module.eval()
            case.workload.examine(module, case.techniques, case.context)
        allocator.pin()
        self._update_result(losses_nats=self._losses_nats())
        self._send_result()

    def _tokens_of_an_epoch(self) -> int | None:
        data = self.case.context.data
        return None if data is None else data.tokens()

    def _bytes_of_an_epoch(self) -> int | None:
        """Return the packed bytes that a step reads, if a step is an epoch."""
        data = self.case.context.data
        return None if data is None or self.case.workload.tokens_per_step() is not None else data.packed_bytes()

    def _send_result(self) -> None:
        """Send the result so far to the runner."""
        facts = {}
        for name, fact in self.case.context.facts.items():
            field = f"context.facts[{plugin_values.field_of(name)}]"
            owner = plugin_values.owner_of(self.case.context.facts, name)
            checked = self._valid(field, functools.partial(plugin_values.checked_fact, name, fact), owner)
            if checked is not None:
                facts[name] = checked
        self._update_result(facts=facts, remarks=self._remarks, notes=self._notes)
        self._meter.send(ResultSoFar(self._result))

    def save(self, module: nn.Module) -> None:
        """Run the phase ``save``."""
        with self._meter.phase("save", "pinned"):
            size_bytes, how = checkpoint.save(module, self._scratch, self.case.techniques, self.case.context)
        self._update_result(disk_bytes=size_bytes, disk_format=how)

    def evaluate(self, module: nn.Module) -> None:
        """Run the phase ``evaluate``, if the model gives logits."""
        if not self.case.model.gives_logits:
            return
        case, reference, within_s = self.case, self._request.reference, self._request.evaluate_s
        if within_s == 0:
            unknown = {field: CustomFigure(None, quality.NOT_JUDGED) for field in case.metrics}
            self._update_result(quality=QualityReading(unknown=quality.NOT_JUDGED), custom_figures=unknown)
            self._send_result()
            return
        with self._meter.phase("evaluate", "pinned"), explaining(module, case.names, case.techniques):
            module.eval()
            found = quality.evaluate(
                case.model, module, case.techniques, case.workload, case.context,
                Path(reference.path), reference.is_written_here, within_s,
            )  # fmt: skip
            figures, failed = quality.custom_figures(
                case.metrics, case.model, module, case.techniques, case.workload, case.context, Path(reference.path),
                len(found.tokens) or None,
            )  # fmt: skip
            unjudged = case.model.unjudged() if case.model.quality else None
        if (note := quality.note_on_time(found)) is not None:
            self._notes.append(note)
        if case.context.ranks is None or case.context.ranks.number == 0:  # the others give the same logits
            self._update_result(quality=found, unjudged=unjudged, custom_figures=figures)
        self._remarks += failed
        if None in found.nats and self.diverged is None:
            self._remarks.append("the logits of held-out text are not finite")
        self._send_result()
