"""The job ``case``: a model, a stack of techniques and a workload on a device."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from membench.plugins import Model, registry
from membench.protocol import requests
from membench.protocol.case import Case, Plugin
from membench.protocol.forking import StartWorker
from membench.protocol.messages import Result
from membench.protocol.readings import FIELD_OF_CATEGORY, PARTS, ProcessReading, QualityReading
from membench.running import communication, deriving, losses, over_ranks
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings, WorkerMemory
from membench.running.jobs.runnable import RunnableJob
from membench.running.losses import LossesAlone
from membench.running.references import References

_EXPECTED = (
    "weights_bytes", "peak_live_bytes", "held_live_bytes", "peak_footprint_bytes", "held_footprint_bytes", "disk_bytes",
    "step_median_s", "tokens_per_s",
)  # fmt: skip
"""Metrics that every record of a case has, as a value or as the reason why it is unknown."""

_LOST = ("lost_bits_per_byte", "lost_bits_per_byte_standard_error")
_MOST_NATS = 460
"""The loss per token at which perplexity is capped: ``exp`` of it stays within the range of stored numbers."""


@dataclass(frozen=True, kw_only=True)
class CaseJob(RunnableJob):
    """A case of a suite.

    Attributes:
        checkouts: the code that may be imported, if another commit is measured alternately.
        losses: of trainings on a single device that a case in ranks is held against.
    """

    case: Case
    checkouts: requests.Checkouts | None = None
    losses: LossesAlone | None = None

    @property
    def names(self) -> Mapping[str, Any]:
        return case_names(self.case)

    @property
    def modules(self) -> frozenset[str]:
        found = {"membench.worker.main", "safetensors.torch"}
        for kind, plugin in self.case.plugins:
            found |= set(registry.find(kind, plugin.use, plugin.files).loaded.imports)
        return frozenset(found)

    @property
    def unverified(self) -> Mapping[str, Plugin]:
        model = self.case.model_plugin
        loaded = registry.find("model", model.use, model.files).loaded
        return {} if getattr(loaded, "verify", None) is Model.verify else {self.case.model: model}

    @property
    def preparation(self) -> Plugin | None:
        return self.case.model_plugin

    def order(self, number: int, references: References) -> StartWorker:
        case = self.case
        work = requests.MeasureCase(
            case.model_plugin,
            case.technique_plugins,
            case.technique.split("+"),
            case.workload_plugin,
            self.settings.seed,
            self.steps,
            references.of(case),
            case.metric_plugins,
            self.checkouts,
            case.model,
            self.settings.evaluate_s,
            self.settings.estimate,
        )
        request = requests.encode(requests.Request(work, self.rank_request(number)))
        return StartWorker(request, number, self.settings.isolation)

    def derive(self, readings: JobReadings) -> DerivedMetrics:
        ranks = [self._derive_rank(readings, process, result) for process, result in readings.ranks]
        if not self.device.in_ranks:
            return ranks[0]
        found = over_ranks.combine(ranks)
        if self.device.shares_cores:
            over_ranks.say_that_cores_are_shared(found, self.device.count, self.threads or 1)
        results = [result for result in readings.results if result is not None]
        if len(results) == len(ranks):
            bits = [result.computing_bits for result in results if result.computing_bits is not None]
            losses.add(found, [result.losses_nats for result in results], self.losses, min(bits, default=None))
        return found

    def _derive_rank(self, readings: JobReadings, process: ProcessReading, result: Result | None) -> DerivedMetrics:
        memory = WorkerMemory.of(process, result, on_gpu=readings.on_gpu)
        if result is None:
            return _derive_partial(readings, process, memory)
        found = DerivedMetrics()
        if result.weights_bytes is not None:
            found.add("weights_bytes", result.weights_bytes, "walk over parameters and buffers")
        _memory(found, readings, process, result, memory)
        if result.disk_bytes is None:
            found.add_unknown("disk_bytes", result.disk_format)
        else:
            found.add("disk_bytes", result.disk_bytes, f"size of the file written by {result.disk_format}")
        is_complete = readings.status in ("ok", "diverged")
        time = deriving.phase_of(process, "time")
        deriving.times(found, result, time, on_gpu=memory.on_gpu, is_complete=is_complete)
        run = deriving.phase_of(process, "run")
        for part in PARTS:
            if part in run.parts:
                deriving.live(found, run.parts[part], f"{part}_peak_live_bytes", memory)
        deriving.warmup(found, deriving.phase_of(process, "warmup"), memory)
        if (saving := process.phase("save")) is not None:
            deriving.live(found, saving, "save_peak_live_bytes", memory)
        deriving.highest_peak(found)
        _holdings(found, result)
        if self.device.in_ranks:
            communication.add(found, result, on_gpu=memory.on_gpu)
        _loss(found, result)
        if result.quality is not None:
            _quality(found, result.quality, is_trained=result.is_trained, unjudged=result.unjudged)
        for name, figure in result.custom_figures.items():
            if figure.value is None:
                found.add_unknown(name, figure.reason or "its plug-in does not say why")
            else:
                found.add(name, figure.value, "a plug-in's own measuring over held-out text")
        return found


def case_names(case: Case) -> dict[str, Any]:
    """Return the names and plug-ins of a case for its record."""
    own = {field: _plugin_fields(plugin) for field, plugin in case.metric_plugins.items()}
    elsewhere = {part: device for part, device in case.parts.items() if device != case.device}
    return {
        "model": case.model,
        "technique": case.technique,
        "workload": case.workload,
        "device": case.device,
        "model_plugin": _plugin_fields(case.model_plugin),
        "technique_plugins": [_plugin_fields(technique) for technique in case.technique_plugins],
        "workload_plugin": _plugin_fields(case.workload_plugin),
        **({"metric_plugins": own} if own else {}),
        **({"part_devices": elsewhere} if elsewhere else {}),
    }


def _plugin_fields(plugin: Plugin) -> dict[str, Any]:
    """Return the fields of a plug-in for a record."""
    # A comparison detects by the fingerprint that the file behind a name has changed.
    own = {"file": plugin.file.name, "sha256": plugin.file.sha256[:12]} if plugin.file else {}
    return {"use": plugin.use, "options": dict(plugin.options), **own}


def _derive_partial(readings: JobReadings, process: ProcessReading, memory: WorkerMemory) -> DerivedMetrics:
    """Derive the metrics of a case that did not reach its end."""
    found = DerivedMetrics()
    for name in _EXPECTED:
        found.add_unknown(name, f"the case ended as {readings.status}")
    for name in ("load", "apply"):
        if (phase := process.phase(name)) is not None:
            deriving.live(found, phase, f"{name}_peak_live_bytes", memory)
    return found


def _memory(
    found: DerivedMetrics, readings: JobReadings, process: ProcessReading, result: Result, memory: WorkerMemory
) -> None:
    """Add the memory and the duration of phases, and the facts that stages reported."""
    load, apply, run, time = (deriving.phase_of(process, name) for name in ("load", "apply", "run", "time"))
    deriving.step_memory(found, run, memory)
    deriving.live(found, load, "load_peak_live_bytes", memory)
    deriving.live(found, apply, "apply_peak_live_bytes", memory)
    found.add("apply_s", apply.duration_s, memory.clock)
    deriving.footprint(found, run, time, memory, readings.interval_s)
    deriving.children(found, process.phases, readings.interval_s)
    for name, fact in result.facts.items():
        found.add(name, fact.value, fact.source)
    store = process.phase("store")
    if store is not None:
        deriving.live(found, store, "store_peak_live_bytes", memory)
        found.add("store_s", store.duration_s, memory.clock)
        if (compressing := store.parts.get("compress")) is not None:
            on_cpu = dataclasses.replace(memory, on_gpu=False)
            deriving.live(found, compressing, "compress_peak_live_bytes", on_cpu)


def _holdings(found: DerivedMetrics, result: Result) -> None:
    """Add the live memory by category, and the sizes of trained and frozen weights."""
    for category, name in FIELD_OF_CATEGORY.items():
        sizes = [part[category] for part in (result.breakdown_bytes or {}).values() if category in part]
        if sizes:
            found.add(name, max(sizes), "walk over storages at the highest moment of a part of a step")
    if result.trained_weights_bytes is not None:
        found.add("trained_weights_bytes", result.trained_weights_bytes, "walk over parameters")
    if result.frozen_weights_bytes is not None:
        source = "walk over parameters and buffers, less those trained"
        found.add("frozen_weights_bytes", result.frozen_weights_bytes, source)


def _loss(found: DerivedMetrics, result: Result) -> None:
    if not result.losses_nats:
        return
    last = result.losses_nats[-1]
    if last is None:
        found.add_unknown("final_loss_nats", "it is not finite")
    else:
        found.add("final_loss_nats", last, "cross entropy in fp32 of the last step")


def _quality(found: DerivedMetrics, quality: QualityReading, *, is_trained: bool, unjudged: str | None) -> None:
    """Add quality from the loss of each piece of text, and the difference to the reference from paired pieces.

    Args:
        unjudged: the reason why the loss says nothing about the model.
    """
    source = "cross entropy in fp32 over held-out text"
    if quality.all_pieces is not None:
        source += f", {len(quality.tokens)} of {quality.all_pieces} pieces"
    nats, all_bytes = quality.nats, None if None in quality.bytes else sum(b for b in quality.bytes if b)
    if is_trained:
        if unjudged is not None or not nats or None in nats or all_bytes is None:
            reason = "it is not finite" if None in nats else "the model has no tokenizer: no text can be put to it"
            reason = unjudged or (quality.unknown if not nats and quality.unknown else reason)
            for name in ("bits_per_byte", "perplexity_per_token", *(_LOST if unjudged and quality.is_compared else ())):
                found.add_unknown(name, reason)
        else:
            all_nats = sum(each for each in nats if each is not None)
            found.add("bits_per_byte", all_nats / all_bytes / math.log(2), source)
            per_token = all_nats / sum(quality.tokens)
            found.add("perplexity_per_token", math.exp(min(per_token, _MOST_NATS)), source)
    against = f"{source}, against the reference's logits"
    if quality.is_compared:
        for name, value in (
            ("kl_nats", quality.kl_nats),
            ("top1_agreement_percent", quality.top1_agreement_percent),
        ):
            if value is None:
                found.add_unknown(name, quality.unknown or "the logits are not finite")
            else:
                found.add(name, value, against)
    reference_nats = quality.reference_nats
    if (
        is_trained
        and unjudged is None
        and all_bytes
        and reference_nats is not None
        and None not in (*nats, *reference_nats)
    ):
        differences = [
            a - b for a, b in zip(nats, reference_nats, strict=True) if a is not None and b is not None
        ]  # fmt: skip
        in_bits = 1 / all_bytes / math.log(2)
        lost, lost_error = _LOST
        found.add(lost, sum(differences) * in_bits, against)
        if len(differences) > 1:
            error = statistics.stdev(differences) * len(differences) ** 0.5 * in_bits
            found.add(lost_error, error, f"{len(differences)} paired pieces of text")
