"""The one table of metrics: what each figure is called, how it is printed, and which direction is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from membench.units import (
    format_bytes,
    format_difference,
    format_divergence,
    format_joules,
    format_number,
    format_percent,
    format_percent_of_all,
    format_seconds,
)


@dataclass(frozen=True)
class Metric:
    """One figure of a case.

    ``name`` is how suites and people write it, ``field`` its key in ``Record.metrics``, ending in the unit;
    ``better`` says which direction is a gain; ``in_table`` whether the comparison shows it: always, only where a
    technique changes it, or only where it decides what memory is needed, too; ``has_ratio`` whether a ratio to the
    reference has a meaning; ``same_within`` how near to one a ratio is neither a gain nor a loss, because runs of the
    same case differ by as much.
    """

    name: str
    field: str
    title: str
    better: Literal["lower", "higher"]
    format: Callable[[Any], str]
    meaning: str
    in_table: bool | Literal["where it decides", "where it changes"] = False
    has_ratio: bool = True
    same_within: float = 0.005


_TIMES_DIFFER = 0.15
_FOOTPRINTS_DIFFER = 0.15
"""The default allocator keeps more or less of what was freed, as it happens."""

METRICS: tuple[Metric, ...] = (
    Metric(
        "weights",
        "weights_bytes",
        "weights",
        "lower",
        format_bytes,
        "parameters and buffers, each storage counted once, quantized tensors opened",
        in_table=True,
    ),
    Metric(
        "peak_live",
        "peak_live_bytes",
        "live peak",
        "lower",
        format_bytes,
        "most memory in use at once during a step",
        in_table=True,
    ),
    Metric("held_live", "held_live_bytes", "live held", "lower", format_bytes, "memory still in use after a step"),
    Metric(
        "peak_footprint",
        "peak_footprint_bytes",
        "footprint peak",
        "lower",
        format_bytes,
        "most memory taken from the machine while steps ran under the default allocator",
        in_table=True,
        same_within=_FOOTPRINTS_DIFFER,
    ),
    Metric(
        "held_footprint",
        "held_footprint_bytes",
        "footprint held",
        "lower",
        format_bytes,
        "memory still taken from the machine after a step",
    ),
    Metric(
        "peak_reserved",
        "peak_reserved_bytes",
        "reserved peak",
        "lower",
        format_bytes,
        "most memory held by torch's caching allocator on a GPU",
    ),
    Metric(
        "context_overhead",
        "context_overhead_bytes",
        "context",
        "lower",
        format_bytes,
        "footprint on a GPU beyond what torch reserved: CUDA context and libraries",
    ),
    Metric(
        "load_peak_live",
        "load_peak_live_bytes",
        "load peak",
        "lower",
        format_bytes,
        "live peak while loading the model",
        in_table="where it decides",
        same_within=0.05,
    ),
    Metric(
        "apply_peak_live",
        "apply_peak_live_bytes",
        "apply peak",
        "lower",
        format_bytes,
        "live peak while the techniques convert the model",
        in_table="where it decides",
        same_within=0.05,
    ),
    Metric(
        "warmup_peak_live",
        "warmup_peak_live_bytes",
        "warm-up peak",
        "lower",
        format_bytes,
        "live peak of the first step, compiling included",
    ),
    Metric("warmup_time", "warmup_s", "warm-up", "lower", format_seconds, "duration of the first step"),
    Metric(
        "trained_weights",
        "trained_weights_bytes",
        "trained",
        "lower",
        format_bytes,
        "parameters that the optimizer trains",
        in_table="where it changes",
    ),
    Metric(
        "frozen_weights",
        "frozen_weights_bytes",
        "frozen",
        "lower",
        format_bytes,
        "weights that training leaves alone: all that is counted as weights less what is trained, buffers too",
    ),
    Metric(
        "optimizer_state",
        "optimizer_state_bytes",
        "optimizer state",
        "lower",
        format_bytes,
        "what the optimizer keeps between steps",
        in_table="where it changes",
    ),
    Metric(
        "cache",
        "cache_bytes",
        "cache",
        "lower",
        format_bytes,
        "key-value cache at the end of a generation",
        in_table="where it changes",
    ),
    Metric(
        "activations",
        "activations_bytes",
        "activations",
        "lower",
        format_bytes,
        "what autograd keeps for the backward pass at the highest moment of a step",
        in_table="where it changes",
    ),
    Metric("apply_time", "apply_s", "apply time", "lower", format_seconds, "duration of converting the model"),
    Metric("disk", "disk_bytes", "disk", "lower", format_bytes, "the saved checkpoint", in_table=True),
    Metric(
        "data",
        "data_bytes",
        "data",
        "lower",
        format_bytes,
        "the files that hold the training data, or the arrays that samples are drawn from",
        in_table=True,
    ),
    Metric(
        "compression_ratio",
        "compression_ratio",
        "compression",
        "higher",
        format_number,
        "bytes into the codec over bytes out of it",
        in_table=True,
        has_ratio=False,
    ),
    Metric(
        "store_peak_live",
        "store_peak_live_bytes",
        "store peak",
        "lower",
        format_bytes,
        "live peak while the training data are made, packed, compressed and read back once",
        in_table="where it decides",
    ),
    Metric(
        "store_time",
        "store_s",
        "store time",
        "lower",
        format_seconds,
        "duration of the same, with the training of a generator where one is trained",
        in_table="where it changes",
        same_within=_TIMES_DIFFER,
    ),
    Metric(
        "compress_peak",
        "compress_peak_live_bytes",
        "compress peak",
        "lower",
        format_bytes,
        "live peak while the training data are packed and compressed",
        in_table=True,
    ),
    Metric(
        "compress_speed",
        "compress_mb_per_s",
        "compress MB/s",
        "higher",
        format_number,
        "of the codec alone, in 10⁶ bytes a second of what goes in",
        in_table=True,
    ),
    Metric(
        "decompress_speed",
        "decompress_mb_per_s",
        "decompress MB/s",
        "higher",
        format_number,
        "of the codec alone, on one thread, in 10⁶ bytes a second of what comes out",
        in_table=True,
    ),
    Metric(
        "open_time",
        "open_s",
        "open time",
        "lower",
        format_seconds,
        "until the first batch can be drawn: all is decoded then, where data are read whole",
        in_table="where it changes",
        same_within=_TIMES_DIFFER,
    ),
    Metric(
        "read_speed",
        "read_mb_per_s",
        "read MB/s",
        "higher",
        format_number,
        "packed bytes of an epoch over the median duration of reading it; opening is not in it",
        in_table=True,
        has_ratio=False,  # of tokens packed otherwise there are other bytes; tokens a second have one
    ),
    Metric(
        "corpus_kept",
        "corpus_kept_percent",
        "text kept",
        "lower",
        format_percent_of_all,
        "share of the text's bytes that is left to train on",
        in_table=True,
        has_ratio=False,
    ),
    Metric(
        "padding",
        "padding_percent",
        "padding",
        "lower",
        format_percent,
        "share of padding in the rows of token ids",
        in_table="where it changes",
        has_ratio=False,
    ),
    Metric(
        "time",
        "step_median_s",
        "time",
        "lower",
        format_seconds,
        "median duration of a step",
        in_table=True,
        same_within=_TIMES_DIFFER,
    ),
    Metric("time_p95", "step_p95_s", "time p95", "lower", format_seconds, "95th percentile of the steps' durations"),
    Metric(
        "time_spread",
        "step_spread_percent",
        "time spread",
        "lower",
        format_percent,
        "interquartile range of the steps' durations over their median",
    ),
    Metric(
        "tokens_per_s",
        "tokens_per_s",
        "tokens/s",
        "higher",
        format_number,
        "tokens of a step, padding left out, over its median duration",
        in_table=True,
        same_within=_TIMES_DIFFER,
    ),
    Metric(
        "first_token",
        "time_to_first_token_s",
        "first token",
        "lower",
        format_seconds,
        "prefill, until the first new token is known",
        in_table=True,
        same_within=_TIMES_DIFFER,
    ),
    Metric(
        "decode_tokens_per_s",
        "decode_tokens_per_s",
        "decode tokens/s",
        "higher",
        format_number,
        "new tokens after the first, over the time they took",
        in_table=True,
        same_within=_TIMES_DIFFER,
    ),
    Metric(
        "prefill_peak_live", "prefill_peak_live_bytes", "prefill peak", "lower", format_bytes, "live peak of prefill"
    ),
    Metric("decode_peak_live", "decode_peak_live_bytes", "decode peak", "lower", format_bytes, "live peak of decoding"),
    Metric("forward_time", "forward_s", "forward", "lower", format_seconds, "median forward pass of a training step"),
    Metric("backward_time", "backward_s", "backward", "lower", format_seconds, "median backward pass"),
    Metric("optimizer_time", "optimizer_s", "optimizer", "lower", format_seconds, "median optimizer step"),
    Metric(
        "forward_peak_live", "forward_peak_live_bytes", "forward peak", "lower", format_bytes, "live peak of forward"
    ),
    Metric(
        "backward_peak_live",
        "backward_peak_live_bytes",
        "backward peak",
        "lower",
        format_bytes,
        "live peak of backward",
    ),
    Metric(
        "optimizer_peak_live",
        "optimizer_peak_live_bytes",
        "optimizer peak",
        "lower",
        format_bytes,
        "live peak of the optimizer step",
    ),
    Metric(
        "children_peak",
        "children_peak_bytes",
        "children peak",
        "lower",
        format_bytes,
        "memory that child processes alone held",
    ),
    Metric("energy", "energy_j", "energy", "lower", format_joules, "energy the GPU took for a step"),
    Metric(
        "final_loss",
        "final_loss_nats",
        "loss",
        "lower",
        format_number,
        "training loss of the last step, in nats a token or sample",
        in_table=True,
    ),
    Metric(
        "accuracy",
        "accuracy_percent",
        "accuracy",
        "higher",
        format_percent_of_all,
        "share of held-out samples whose likeliest class is theirs, after all steps of the training",
        in_table=True,
        has_ratio=False,
    ),
    Metric(
        "bits_per_byte",
        "bits_per_byte",
        "bits/byte",
        "lower",
        format_number,
        "held-out quality, where the model is trained",
        in_table=True,
    ),
    Metric(
        "quality_loss",
        "lost_bits_per_byte",
        "lost bits/byte",
        "lower",
        format_difference,
        "held-out bits per byte above the reference, from paired pieces of text",
        in_table=True,
        has_ratio=False,
    ),
    Metric(
        "quality_loss_error",
        "lost_bits_per_byte_standard_error",
        "± bits/byte",
        "lower",
        format_number,
        "standard error of the paired difference",
        has_ratio=False,
    ),
    Metric(
        "perplexity",
        "perplexity_per_token",
        "perplexity",
        "lower",
        format_number,
        "held-out perplexity per token, where the model is trained",
    ),
    Metric(
        "kl",
        "kl_nats",
        "KL",
        "lower",
        format_divergence,
        "mean divergence of the logits from the reference's, in nats a token",
        in_table=True,
        has_ratio=False,
    ),
    Metric(
        "top1_agreement",
        "top1_agreement_percent",
        "top-1",
        "higher",
        format_percent_of_all,
        "share of held-out tokens for which the likeliest next token is the reference's",
        in_table=True,
        has_ratio=False,
    ),
)

METRICS_OF_PROGRAMS = ("peak_footprint", "children_peak", "time", "energy")
"""The metrics that a user's program has."""

LARGEST_SIZE = 2**63 - 1
_LEAST_FIGURE, _MOST_FIGURE = 1e-100, 1e200
"""Between these the ratio of any two figures is a number."""


def can_be_a_figure(field: str, value: float) -> bool:
    """Whether a metric can have come to this: to nothing, or to something of a size that can be worked with."""
    most = LARGEST_SIZE if field.endswith("_bytes") else _MOST_FIGURE
    return value == 0 or _LEAST_FIGURE <= abs(value) <= most


_OWN = "own."
_OWN_FIELD = re.compile(r"own\.(?P<name>[a-z][a-z0-9_]*)\.(?P<better>lower|higher)(?:\.(?P<unit>[^\s._]{1,16}))?")


def own_field(name: str, better: str, unit: str = "") -> str:
    """The field of a plug-in's metric. It says all that a view needs, and is no field of a built-in one.

    Raises:
        ValueError: if no field can be made of them.
    """
    field = ".".join(filter(None, ("own", name, better, unit)))
    if _OWN_FIELD.fullmatch(field) is None or not field.isprintable():
        raise ValueError(
            "a metric's name has small letters, digits and '_', and its unit 16 characters at most, none of them a"
            " space, '.' or '_'"
        )
    return field


def is_own(field: str) -> bool:
    """Whether a field is that of a plug-in's metric."""
    return field.startswith(_OWN)


class _ByField(dict[str, Metric]):
    """The built-in metrics, and those of plug-ins as they are asked for."""

    def __missing__(self, field: str) -> Metric:
        parts = _OWN_FIELD.fullmatch(field)
        if parts is None:
            raise KeyError(field)
        name, unit = parts["name"], parts["unit"] or ""

        def shown(value: float) -> str:
            return f"{format_number(value)}{'' if unit in ('', '%') else ' '}{unit}"

        better: Literal["lower", "higher"] = "lower" if parts["better"] == "lower" else "higher"
        meaning = "as its plug-in measures it"
        self[field] = Metric(
            name, field, name.replace("_", " "), better, shown, meaning, in_table=True, has_ratio=False
        )
        return self[field]


METRIC_OF_FIELD: Mapping[str, Metric] = _ByField({metric.field: metric for metric in METRICS})


def own_metrics(fields: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of plug-ins among these fields."""
    return tuple(METRIC_OF_FIELD[field] for field in sorted({field for field in fields if _OWN_FIELD.fullmatch(field)}))


def metrics_with(fields: Iterable[str]) -> tuple[Metric, ...]:
    """The built-in metrics, and those of plug-ins among these fields."""
    return (*METRICS, *own_metrics(fields))
