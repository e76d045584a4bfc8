"""Readings of a measured process: of a part of a step, of a phase, and of the process (rank).

The worker's meter creates them, the observer completes phases with its samples, and the record stores them. The schema
of run files validates the same types. A value that was not read is ``None``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from membench.units import LARGEST_SIZE, LARGEST_VALUE

# Strict: strings and booleans are not accepted as numbers.
Count = Annotated[int, Field(strict=True, ge=-LARGEST_SIZE, le=LARGEST_SIZE)]
Number = Count | Annotated[float, Field(strict=True, ge=-LARGEST_VALUE, le=LARGEST_VALUE)]
"""A figure: sums and products of some of them are finite."""
Size = Annotated[int, Field(strict=True, ge=0, le=LARGEST_SIZE)]
SignedSize = Annotated[int, Field(strict=True, ge=-LARGEST_SIZE, le=LARGEST_SIZE)]
"""Bytes above a baseline; negative if memory of the baseline was freed."""
Seconds = Annotated[float, Field(strict=True, ge=0)]
Duration = Annotated[float, Field(strict=True, ge=0, le=1e12)]
"""Seconds that a clock can have counted, so that sums of them are finite."""
PARTS = ("prefill", "decode", "forward", "backward", "optimizer")
"""The parts of a step whose live peaks are figures."""
FIELD_OF_CATEGORY: Mapping[str, str] = {
    "optimizer": "optimizer_state_bytes",
    "cache": "cache_bytes",
    "activations": "activations_bytes",
    "gradients": "gradients_bytes",
    "communication": "communication_memory_bytes",
}
"""The metric field of each category of live memory that is a figure of its own."""
LAUNCHED_RANK = "rank"
"""The role of a rank that a user's program started itself."""
Bound = Literal["exact", "at least", "at most", "about"]
"""``about``: an estimate, which may be off in both directions."""


@dataclass(frozen=True)
class Reading:
    """Base class of readings, validated when decoded; keys added by later versions are ignored."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True)
class Baseline(Reading):
    """Resident memory of a worker before the job; readings are relative to it."""

    anonymous_bytes: Size = 0
    file_bytes: Size = 0

    @property
    def resident_bytes(self) -> int:
        """Anonymous and file pages together."""
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
        peak_live_bytes: the kernel's peak less the smaller count of file pages, and less what was free in the process
            when the phase began.
        peak_live_at_least_bytes, peak_live_at_most_bytes: bounds of the live peak.
        file_most_bytes: the maximum of the file pages at the two boundaries.
        peak_footprint_bytes: the kernel's peak of all pages.
        cuda_peak_allocated_bytes: torch's peak since the first boundary; likewise the other ``cuda_`` fields.
    """

    peak_live_bytes: SignedSize | None = None
    peak_live_at_least_bytes: SignedSize | None = None
    peak_live_at_most_bytes: SignedSize | None = None
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
        """The live peak on the GPU if torch's counters were read, else in the process."""
        return self.cuda_peak_allocated_bytes if self.reads_gpu_itself else self.peak_live_bytes

    @property
    def reads_gpu_itself(self) -> bool:
        """Whether torch's own counters were read."""
        return self.cuda_peak_allocated_bytes is not None

    @property
    def live_held_bytes(self) -> int | None:
        """Live memory at the end: on the GPU if torch's counters were read, else in the process."""
        return self.cuda_held_allocated_bytes if self.reads_gpu_itself else self.held_live_bytes


@dataclass(frozen=True, kw_only=True)
class PartReading(MemoryReading):
    """A part of a step, such as ``forward``: the duration of each pass, and its memory if it was read."""

    durations_s: Sequence[Duration] = ()


@dataclass(frozen=True, kw_only=True)
class PhaseReading(MemoryReading):
    """A phase of a job.

    Attributes:
        allocator: ``pinned`` (freed memory is returned at once), ``default`` (as in a user's process), or the name of
            an allocator that cannot be pinned, such as ``jemalloc``.
        steps: the number of steps in the phase, warm-up steps included.
        waited_s: for how long its threads, all together, waited for cores used by other processes.
        free_bytes: what was free but resident in the worker when the phase began, above what was at the baseline.
        inside: the enclosing phase, if phases are nested.
        passes: how often a script entered the phase.
        bound: the kind of bound that ``peak_footprint_bytes`` is, if it is not exact.
        own_peak_bytes: the peak of a script alone, if ``peak_footprint_bytes`` includes its children.
        began_s: the begin in seconds since the worker started; likewise ``ended_s``.
        samples: the number of the observer's samples; its values are maxima over them.
        family_rss_bytes: the peak of the resident memory of process and children together; ``None`` without children.
        gpu_used_peak_bytes: the used memory of the whole device above its idle level.
        gpu_unknown: the reason why NVML reports nothing.
    """

    name: str
    allocator: str
    duration_s: Duration = 0.0
    steps: Count | None = None
    waited_s: Duration | None = None
    parts: Mapping[str, PartReading] = field(default_factory=dict)
    file_start_bytes: SignedSize | None = None
    free_bytes: SignedSize | None = None
    inside: str | None = None
    passes: Count | None = None
    bound: Bound | None = None
    own_peak_bytes: Size | None = None
    began_s: Duration | None = None
    ended_s: Duration | None = None
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
    """Layers of a model with the same structure, and the bytes of their weights."""

    modules: str
    count: Annotated[int, Field(strict=True, ge=1)]
    bytes: Size


@dataclass(frozen=True, kw_only=True)
class RankEstimate(Reading):
    """What a rank of a case is estimated to need.

    Attributes:
        ranks: the numbers of the ranks that it stands for.
        how: ``traced``: its stages ran on fake tensors; ``arithmetic``: from shapes and what techniques name.
        figures: values by metric field.
        breakdown_bytes, peak_part: as in ``ProcessReading``.
        added_bytes: constants that are in the live peak, by what they are.
        leaves_out: what is in no figure.
        from_layers: how many layers the models had from which those of a deeper one follow.
    """

    ranks: Sequence[Count]
    how: Literal["traced", "arithmetic"]
    figures: Mapping[str, Number]
    breakdown_bytes: Mapping[str, Mapping[str, SignedSize]] | None = None
    peak_part: str | None = None
    added_bytes: Mapping[str, Size] = field(default_factory=dict)
    leaves_out: Sequence[str] = ()
    from_layers: Sequence[Count] = ()


@dataclass(frozen=True, kw_only=True)
class QualityReading(Reading):
    """Held-out loss of each piece of text, and the divergence of the logits from the reference's.

    Attributes:
        nats: the loss of each piece; ``None`` if it is not finite.
        tokens: the number of predicted tokens of each piece.
        bytes: the size of each piece's text; ``None`` if the tokenizer does not provide it.
        reference_nats: the loss of each piece under the reference's logits; ``None`` without a reference.
        kl_nats: KL divergence from the reference's distribution, as the mean over tokens.
        unknown: the reason why no comparison with the reference was possible.
        all_pieces: the number of pieces that there are, if quality was judged over fewer for want of time.
    """

    nats: Sequence[Number | None] = ()
    tokens: Sequence[Count] = ()
    bytes: Sequence[Count | None] = ()
    reference_nats: Sequence[Number | None] | None = None
    kl_nats: Number | None = None
    top1_agreement_percent: Number | None = None
    unknown: str | None = None
    all_pieces: Count | None = None

    @property
    def is_compared(self) -> bool:
        """Whether a comparison with the reference was requested: values that are missing then have a reason."""
        fields = (self.reference_nats, self.kl_nats, self.top1_agreement_percent, self.unknown)
        return any(each is not None for each in fields)


@dataclass(frozen=True, kw_only=True)
class ProcessReading(Reading):
    """All readings of one process (rank) of a job.

    Attributes:
        role: ``worker``; ``script`` for a user's program; ``rank`` for a rank that such a program started itself.
        durations_s: the duration of each timed step.
        waited_s: per timed step, the time that all its threads together waited for cores used by other processes.
        passive: per timed step, whether several threads worked in it and waited for each other passively, because other
            processes used the cores; they do not in a user's process.
        wait_policy: how threads waited for each other in the timed steps, and why, as text.
        slept_s: per timed step, how long the thread that computes slept; read where ranks wait for each other.
        corpus: a digest of the training text.
        losses_nats: the loss of each training step; ``None`` if it is not finite.
        modules_bytes: the sizes of the weights by group of modules, largest first.
        breakdown_bytes: live memory at the peak of each part of a step, by part and category.
        peak_part: the part with the largest live peak.
        communicated_bytes: what a step hands to collectives, by collective; ``worker.communication`` says what counts.
        exit_code: the exit code of a script that ended by itself.
    """

    role: str
    rank: Count
    device: str
    pid: Count | None = None
    gpu: GpuReading | None = None
    baseline: Baseline | None = None
    phases: Sequence[PhaseReading]
    durations_s: Sequence[Seconds] | None = None
    waited_s: Sequence[Duration] | None = None
    passive: Sequence[Annotated[bool, Field(strict=True)]] | None = None
    wait_policy: str | None = None
    slept_s: Sequence[Duration] | None = None
    corpus: str | None = None
    losses_nats: Sequence[Number | None] | None = None
    modules_bytes: Sequence[ModulesReading] | None = None
    breakdown_bytes: Mapping[str, Mapping[str, SignedSize]] | None = None
    peak_part: str | None = None
    communicated_bytes: Mapping[str, Size] | None = None
    quality: QualityReading | None = None
    exit_code: Count | None = None

    @property
    def includes_interpreter(self) -> bool:
        """Whether its memory includes interpreter and libraries: a script has no baseline."""
        return self.role != "worker"

    def phase(self, name: str) -> PhaseReading | None:
        """Return the phase with a name, or ``None`` if the process did not complete it."""
        return next((phase for phase in self.phases if phase.name == name), None)


def outer_phase(name: str, names: Sequence[str]) -> str | None:
    """Return the phase that encloses a marked phase; ``None`` for the whole program.

    Args:
        names: the names of all phases of the script; the whole program comes first. The name of a phase is a prefix of
            the names of nested phases.
    """
    if name == names[0]:
        return None
    around = [each for each in names[1:] if name.startswith(f"{each}.")]
    return max(around, key=len, default=names[0])


def plain(value: Any) -> Any:
    """Convert readings, or containers of readings, to JSON types; fields that are ``None`` are omitted."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
        return {name: plain(each) for name, each in items if each is not None}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
