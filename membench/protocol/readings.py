"""What is read of a measured process: a reading a part, a phase and a process (rank).

The worker's meter makes them, the observer completes a phase with what it saw from outside, the record keeps them, and
the schema of runs' files checks these same types. A figure that was not read is ``None``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from membench.units import LARGEST_SIZE

# Strict: a text or a truth value is no number.
Count = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Size = Annotated[int, Field(strict=True, ge=0, le=LARGEST_SIZE)]
SignedSize = Annotated[int, Field(strict=True, ge=-LARGEST_SIZE, le=LARGEST_SIZE)]
"""Above a baseline: what was freed since then makes it negative."""
Seconds = Annotated[float, Field(strict=True, ge=0)]
Bound = Literal["exact", "at least", "at most"]


@dataclass(frozen=True)
class Reading:
    """Checked when it is decoded; a later version may add keys, which are left out here."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True)
class Baseline(Reading):
    """Resident memory of a worker before anything of the job: peaks count from there."""

    anonymous_bytes: Size = 0
    file_bytes: Size = 0

    @property
    def resident_bytes(self) -> int:
        return self.anonymous_bytes + self.file_bytes


@dataclass(frozen=True)
class GpuReading(Reading):
    """The GPU that a worker runs on, as torch describes it."""

    uuid: str | None = None
    name: str | None = None
    capability: Sequence[Count] | None = None
    memory_bytes: Size | None = None
    cuda: str | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryReading(Reading):
    """Memory between two boundaries, in bytes above the worker's baseline.

    Attributes:
        peak_live_bytes: the kernel's peak less the file pages at the two ends: at most so much was live.
        peak_live_at_least_bytes: the other end of that bracket.
        file_most_bytes: file pages, the higher of the two ends.
        peak_footprint_bytes: the kernel's peak of all pages.
        cuda_peak_allocated_bytes: torch's own peak since the boundary; the other ``cuda_`` figures likewise.
    """

    peak_live_bytes: SignedSize | None = None
    peak_live_at_least_bytes: SignedSize | None = None
    held_live_bytes: SignedSize | None = None
    peak_footprint_bytes: SignedSize | None = None
    held_footprint_bytes: SignedSize | None = None
    file_most_bytes: SignedSize | None = None
    file_end_bytes: SignedSize | None = None
    cuda_peak_allocated_bytes: Size | None = None
    cuda_peak_reserved_bytes: Size | None = None
    cuda_held_allocated_bytes: Size | None = None
    cuda_held_reserved_bytes: Size | None = None

    @property
    def live_peak_bytes(self) -> int | None:
        """The live peak where the work was done: on the GPU, if there was one."""
        return self.cuda_peak_allocated_bytes if self.reads_gpu_itself else self.peak_live_bytes

    @property
    def reads_gpu_itself(self) -> bool:
        """Whether torch's own counters were read."""
        return self.cuda_peak_allocated_bytes is not None

    @property
    def live_held_bytes(self) -> int | None:
        """Live memory at the end, where the work was done."""
        return self.cuda_held_allocated_bytes if self.reads_gpu_itself else self.held_live_bytes


@dataclass(frozen=True, kw_only=True)
class PartReading(MemoryReading):
    """A part of a step, such as ``forward``: how long it took each time, and its memory where that was read."""

    durations_s: Sequence[Seconds] = ()


@dataclass(frozen=True, kw_only=True)
class PhaseReading(MemoryReading):
    """A phase of a job.

    Attributes:
        allocator: ``pinned`` (freed memory goes back at once) or ``default`` (as a user's process has it).
        steps: that ran in it, warm-ups included.
        inside: the phase that this one lies in, where phases are nested.
        passes: how often a script went through it.
        bound: what ``peak_footprint_bytes`` is, where that is not exact.
        own_peak_bytes: of a script alone, where its children are in ``peak_footprint_bytes``.
        began_s: since the worker started; ``ended_s`` likewise.
        samples: how often the observer looked; what it saw is the highest of these looks.
        family_rss_bytes: resident in the process and its children at one moment; ``None``: there were no children.
        gpu_used_peak_bytes: of the whole device, above its idle level.
        gpu_unknown: why NVML shows nothing.
    """

    name: str
    allocator: str
    duration_s: Seconds = 0.0
    steps: Count | None = None
    parts: Mapping[str, PartReading] = field(default_factory=dict)
    file_start_bytes: SignedSize | None = None
    inside: str | None = None
    passes: Count | None = None
    bound: Bound | None = None
    own_peak_bytes: Size | None = None
    began_s: Number | None = None
    ended_s: Number | None = None
    samples: Count | None = None
    file_peak_bytes: Size | None = None
    children_peak_bytes: Size | None = None
    family_rss_bytes: Size | None = None
    family_anonymous_bytes: SignedSize | None = None
    gpu_process_peak_bytes: Size | None = None
    gpu_process_end_bytes: Size | None = None
    gpu_used_peak_bytes: Size | None = None
    gpu_used_end_bytes: Size | None = None
    gpu_energy_j: Number | None = None
    gpu_unknown: str | None = None


@dataclass(frozen=True)
class ModulesReading(Reading):
    """Layers of a model that are alike, and the bytes of their weights."""

    modules: str
    count: Annotated[int, Field(strict=True, ge=1)]
    bytes: Size


@dataclass(frozen=True, kw_only=True)
class QualityReading(Reading):
    """Held-out loss of each piece of text, and how far the logits are from the reference's.

    Attributes:
        nats: of each piece; ``None`` where it is not finite.
        tokens: predicted in each piece.
        bytes: of each piece's text; ``None`` where the tokenizer cannot tell.
        reference_nats: of each piece, by the reference's logits; ``None``: there are none to compare with.
        kl_nats: mean over tokens of the divergence from the reference's distribution.
        unknown: why nothing could be compared with the reference.
    """

    nats: Sequence[Number | None] = ()
    tokens: Sequence[Count] = ()
    bytes: Sequence[Count | None] = ()
    reference_nats: Sequence[Number | None] | None = None
    kl_nats: Number | None = None
    top1_agreement_percent: Number | None = None
    unknown: str | None = None

    @property
    def is_compared(self) -> bool:
        """Whether the reference's logits were asked for: then what is not known of them has a reason."""
        asked = (self.reference_nats, self.kl_nats, self.top1_agreement_percent, self.unknown)
        return any(each is not None for each in asked)


@dataclass(frozen=True, kw_only=True)
class ProcessReading(Reading):
    """All that was read of one process (rank) of a job.

    Attributes:
        role: ``worker``, or ``script`` for a user's own program.
        durations_s: of each timed step; ``waited_s``: for how long its threads waited meanwhile for cores that others
            had, all together.
        corpus: a digest of the training text.
        losses_nats: of each training step; ``None`` where it is not finite.
        modules_bytes: what the weights are made of, the largest first.
        breakdown_bytes: by part of a step and category, what held live memory at the part's highest moment.
        peak_part: the part with the highest live peak.
        exit_code: of a script that ended by itself.
    """

    role: str
    rank: Count
    device: str
    pid: Count | None = None
    gpu: GpuReading | None = None
    baseline: Baseline | None = None
    phases: Sequence[PhaseReading]
    durations_s: Sequence[Seconds] | None = None
    waited_s: Sequence[Seconds] | None = None
    corpus: str | None = None
    losses_nats: Sequence[Number | None] | None = None
    modules_bytes: Sequence[ModulesReading] | None = None
    breakdown_bytes: Mapping[str, Mapping[str, SignedSize]] | None = None
    peak_part: str | None = None
    quality: QualityReading | None = None
    exit_code: Count | None = None

    @property
    def includes_interpreter(self) -> bool:
        """Whether its figures hold all of the process, with interpreter and libraries: a script has no baseline."""
        return self.role == "script"

    def phase(self, name: str) -> PhaseReading | None:
        """The phase of a name, if the process got there."""
        return next((phase for phase in self.phases if phase.name == name), None)


def outer_phase(name: str, names: Sequence[str]) -> str | None:
    """The phase that a marked one lies in.

    Args:
        names: of all phases of the script, the whole first. The name of a phase is the beginning of those in it.
    """
    if name == names[0]:
        return None
    around = [each for each in names[1:] if name.startswith(f"{each}.")]
    return max(around, key=len, default=names[0])


def plain(value: Any) -> Any:
    """A reading, or whatever holds readings, as JSON has it; what is ``None`` in a reading is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
        return {name: plain(of_name) for name, of_name in named if of_name is not None}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
