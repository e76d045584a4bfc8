"""The table of metrics. To add a built-in metric, measure it, derive it from the readings, and add a row here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import get_args

from membench import units
from membench.records.metric import Loss, Metric, Phase, Role, is_own, own_metric

_TIMES_DIFFER = 0.15
_FOOTPRINTS_DIFFER = 0.15
"""How much of the freed memory the default allocator retains varies from run to run."""

SAME_ACCURACY = 0.5
"""In percent of samples: a few of the held-out samples."""

NO_DIVERGENCE = 1e-6
"""Divergence, in nats, of fp32 logits that differ only in the order of additions."""

# Memory metrics that are reproducible within 1 % are watched by default.
_counted = partial(Metric, unit=units.BYTES, better="lower", depends_on="counted", role="memory", tolerance=0.01)
_live = partial(Metric, unit=units.BYTES, better="lower", depends_on="live", role="memory", signed="in noise")
_taken = partial(Metric, unit=units.BYTES, better="lower", depends_on="footprint", role="memory")
_duration = partial(Metric, unit=units.SECONDS, better="lower", depends_on="time", role="time")
_rate = partial(Metric, better="higher", depends_on="time", role="rate")
_data = partial(Metric, depends_on="counted", role="size of data", over_ranks="any")
_quality = partial(Metric, depends_on="counted", role="quality", over_ranks="any")

# fmt: off
METRICS: tuple[Metric, ...] = (
    _counted("weights", "weights_bytes", "weights",
             "parameters and buffers, each storage counted once, quantized tensors opened",
             in_table=True, category="weights"),
    _live("peak_live", "peak_live_bytes", "live peak", "most memory in use at once during a step",
          in_table=True, tolerance=0.01, peak_of="run"),
    _live("total_peak_live", "total_peak_live_bytes", "total peak",
          "the live peaks of all ranks together, each at its own highest moment of a step", in_table=True),
    Metric("imbalance", "imbalance_ratio", "imbalance",
           "live peak of the rank that needs most over the mean of the ranks",
           units.RATIO, "lower", depends_on="live", role="memory", in_table=True, has_ratio=False, names_rank=True),
    _live("held_live", "held_live_bytes", "live held", "memory still in use after a step", tolerance=0.01),
    Metric("peak_over_held", "peak_over_held_ratio", "peak over held",
           "live peak of a step over what is held after it; large where activations dominate",
           units.RATIO, "lower", depends_on="live", role="memory", has_ratio=False),
    _taken("peak_footprint", "peak_footprint_bytes", "footprint peak",
           "most memory taken from the machine while steps ran under the default allocator",
           in_table=True, same_within=_FOOTPRINTS_DIFFER, signed="in noise", of_scripts=True),
    _taken("total_footprint", "total_peak_footprint_bytes", "total footprint",
           "the footprint peaks of a program's ranks, each at its own highest moment; what they share counts in each",
           in_table=True, same_within=_FOOTPRINTS_DIFFER, signed="in noise", of_scripts=True),
    _taken("held_footprint", "held_footprint_bytes", "footprint held",
           "memory still taken from the machine after a step", signed="in noise"),
    _taken("peak_reserved", "peak_reserved_bytes", "reserved peak",
           "most memory held by torch's caching allocator on a GPU"),
    _taken("context_overhead", "context_overhead_bytes", "context",
           "footprint on a GPU beyond what torch reserved: CUDA context and libraries", signed="in noise"),
    _live("load_peak_live", "load_peak_live_bytes", "load peak", "live peak while loading the model",
          in_table="where it decides", same_within=0.05, tolerance=0.01, peak_of="load"),
    _live("apply_peak_live", "apply_peak_live_bytes", "apply peak",
          "live peak while the techniques convert the model",
          in_table="where it decides", same_within=0.05, tolerance=0.01, peak_of="apply"),
    _live("warmup_peak_live", "warmup_peak_live_bytes", "warm-up peak",
          "live peak of the first step, compilers' processes included",
          in_table="where it needs more", same_within=0.05, peak_of="warmup"),
    _live("save_peak_live", "save_peak_live_bytes", "save peak", "live peak while a checkpoint of the model is saved",
          in_table="where it decides", same_within=0.05, peak_of="save"),
    _live("highest_peak_live", "highest_peak_live_bytes", "highest peak",
          "the highest live peak of all phases, compilers' processes included: what has to fit"),
    Metric("communicated", "communicated_bytes", "communicated",
           "what a rank hands to collectives in a step, each counted with the whole tensor that it works on",
           units.BYTES, "lower", depends_on="counted", role="size of data"),
    Metric("communication_wait", "communication_wait_percent", "waiting",
           "share of the steps in which a rank sleeps, waiting for other ranks or for a collective's own work",
           units.PERCENT, "lower", depends_on="time", role="time", has_ratio=False),
    _duration("warmup_time", "warmup_s", "warm-up", "duration of the first step", timed_in="warmup"),
    _counted("trained_weights", "trained_weights_bytes", "trained", "parameters that the optimizer trains",
             in_table="where it changes", category="weights"),
    _counted("frozen_weights", "frozen_weights_bytes", "frozen",
             "weights that training leaves alone: all that is counted as weights less what is trained, buffers too",
             category="weights"),
    _counted("optimizer_state", "optimizer_state_bytes", "optimizer state",
             "what the optimizer keeps between steps", in_table="where it changes", category="optimizer"),
    _counted("cache", "cache_bytes", "cache", "key-value cache at the end of a generation",
             in_table="where it changes", category="cache"),
    _counted("activations", "activations_bytes", "activations",
             "what autograd keeps for the backward pass at the highest moment of a step",
             in_table="where it changes", category="activations"),
    _counted("gradients", "gradients_bytes", "gradients", "gradients at the highest moment of a step",
             in_table="where it changes", category="gradients"),
    _counted("communication_memory", "communication_memory_bytes", "communication memory",
             "what a rank holds for collectives at the highest moment of a step",
             in_table="where it changes", category="communication"),
    _duration("apply_time", "apply_s", "apply time", "duration of converting the model", timed_in="apply"),
    _counted("disk", "disk_bytes", "disk", "the saved checkpoint",
             in_table=True, role="size of data", category="weights", over_ranks="any"),
    _counted("data", "data_bytes", "data",
             "the files that hold the training data, or the arrays that samples are drawn from",
             in_table=True, role="size of data"),
    _data("compression_ratio", "compression_ratio", "compression", "bytes into the codec over bytes out of it",
          units.RATIO, "higher", in_table=True, has_ratio=False),
    _live("store_peak_live", "store_peak_live_bytes", "store peak",
          "live peak while the training data are made, packed, compressed and read back once",
          in_table="where it decides", tolerance=0.01, peak_of="store"),
    _duration("store_time", "store_s", "store time",
              "duration of the same, with the training of a generator where one is trained",
              in_table="where it changes", same_within=_TIMES_DIFFER, timed_in="store"),
    _live("compress_peak", "compress_peak_live_bytes", "compress peak",
          "live peak while the training data are packed and compressed",
          in_table=True, peak_of="store", part="compress"),
    _rate("compress_speed", "compress_mb_per_s", "compress MB/s",
          "of the codec alone, in 10⁶ bytes a second of what goes in", units.MEGABYTES_PER_SECOND, in_table=True,
          timed_in="store"),
    _rate("decompress_speed", "decompress_mb_per_s", "decompress MB/s",
          "of the codec alone, on one thread, in 10⁶ bytes a second of what comes out", units.MEGABYTES_PER_SECOND,
          in_table=True),
    _duration("open_time", "open_s", "open time",
              "until the first batch can be drawn: all is decoded then, where data are read whole",
              in_table="where it changes", same_within=_TIMES_DIFFER),
    _rate("read_speed", "read_mb_per_s", "read MB/s",
          "packed bytes of an epoch over the median duration of reading it; opening is not in it",
          units.MEGABYTES_PER_SECOND, in_table=True, part="step",
          has_ratio=False),  # tokens packed in another way are other bytes; compare tokens a second instead
    _data("corpus_kept", "corpus_kept_percent", "text kept", "share of the text's bytes that is left to train on",
          units.PERCENT_OF_ALL, "lower", in_table=True, has_ratio=False),
    _data("padding", "padding_percent", "padding", "share of padding in the rows of token ids",
          units.PERCENT, "lower", in_table="where it changes", has_ratio=False),
    _duration("time", "step_median_s", "time", "median duration of a step", in_table=True,
              same_within=_TIMES_DIFFER, tolerance=0.1, part="step", of_scripts=True, keeps_samples=True),
    _duration("time_p95", "step_p95_s", "time p95", "95th percentile of the steps' durations"),
    Metric("time_spread", "step_spread_percent", "time spread",
           "interquartile range of the steps' durations over their median",
           units.PERCENT, "lower", depends_on="time", role="time"),
    _rate("tokens_per_s", "tokens_per_s", "tokens/s", "tokens of a step, padding left out, over its median duration",
          units.TOKENS_PER_SECOND, in_table=True, same_within=_TIMES_DIFFER, part="step"),
    _duration("first_token", "time_to_first_token_s", "first token", "prefill, until the first new token is known",
              in_table=True, same_within=_TIMES_DIFFER, part="prefill", keeps_samples=True),
    _rate("decode_tokens_per_s", "decode_tokens_per_s", "decode tokens/s",
          "new tokens after the first, over the time they took", units.TOKENS_PER_SECOND,
          in_table=True, same_within=_TIMES_DIFFER, part="decode", keeps_samples=True),
    _live("prefill_peak_live", "prefill_peak_live_bytes", "prefill peak", "live peak of prefill",
          peak_of="run", part="prefill"),
    _live("decode_peak_live", "decode_peak_live_bytes", "decode peak", "live peak of decoding",
          peak_of="run", part="decode"),
    _duration("forward_time", "forward_s", "forward", "median forward pass of a training step", part="forward"),
    _duration("backward_time", "backward_s", "backward", "median backward pass", part="backward"),
    _duration("optimizer_time", "optimizer_s", "optimizer", "median optimizer step", part="optimizer"),
    _live("forward_peak_live", "forward_peak_live_bytes", "forward peak", "live peak of forward",
          peak_of="run", part="forward"),
    _live("backward_peak_live", "backward_peak_live_bytes", "backward peak", "live peak of backward",
          peak_of="run", part="backward"),
    _live("optimizer_peak_live", "optimizer_peak_live_bytes", "optimizer peak", "live peak of the optimizer step",
          peak_of="run", part="optimizer"),
    _taken("children_peak", "children_peak_bytes", "children peak", "memory that child processes alone held",
           of_scripts=True),
    Metric("energy", "energy_j", "energy", "energy the GPU took for a step",
           units.JOULES, "lower", depends_on="time", role="energy", of_scripts=True, over_ranks="sum"),
    _quality("final_loss", "final_loss_nats", "loss", "training loss of the last step, in nats a token or sample",
             units.NATS, "lower", in_table=True, signed="in noise", gains_by_chance=True),
    _quality("loss_difference", "loss_difference_nats", "loss apart",
             "how far the training losses of ranks are from the reference's at most, in nats, step by step",
             units.NATS_APART, "lower", in_table=True, has_ratio=False),
    _quality("accuracy", "accuracy_percent", "accuracy",
             "share of held-out samples whose likeliest class is theirs, after all steps of the training",
             units.PERCENT_OF_ALL, "higher", in_table=True, has_ratio=False,
             loss=Loss("accuracy lost, percentage points", chance=SAME_ACCURACY)),
    _quality("bits_per_byte", "bits_per_byte", "bits/byte", "held-out quality, where the model is trained",
             units.BITS_PER_BYTE, "lower", in_table=True, learnt=True, gains_by_chance=True),
    _quality("quality_loss", "lost_bits_per_byte", "lost bits/byte",
             "held-out bits per byte above the reference, from paired pieces of text",
             units.BITS_PER_BYTE_LOST, "lower", in_table=True, has_ratio=False, signed="yes", learnt=True,
             of_reference=0.0, gains_by_chance=True,
             loss=Loss("lost bits/byte", error_field="lost_bits_per_byte_standard_error")),
    _quality("quality_loss_error", "lost_bits_per_byte_standard_error", "± bits/byte",
             "standard error of the paired difference",
             units.BITS_PER_BYTE_ERROR, "lower", has_ratio=False, has_difference=False, learnt=True),
    _quality("perplexity", "perplexity_per_token", "perplexity",
             "held-out perplexity per token, where the model is trained", units.PER_TOKEN, "lower", learnt=True),
    _quality("kl", "kl_nats", "KL", "mean divergence of the logits from the reference's, in nats a token",
             units.NATS_APART, "lower", in_table=True, has_ratio=False, signed="in noise", learnt=True,
             of_reference=0.0, loss=Loss("KL from the reference, nats a token", "divergence", NO_DIVERGENCE)),
    _quality("top1_agreement", "top1_agreement_percent", "top-1",
             "share of held-out tokens for which the likeliest next token is the reference's",
             units.PERCENT_OF_ALL, "higher", in_table=True, has_ratio=False, learnt=True, of_reference=100.0),
)
# fmt: on

OF_HELD_OUT_TEXT = frozenset({
    "bits_per_byte", "lost_bits_per_byte", "lost_bits_per_byte_standard_error", "perplexity_per_token", "kl_nats",
    "top1_agreement_percent",
})  # fmt: skip
"""Fields of the metrics that are judged over held-out text, besides those of plug-ins."""

METRICS_OF_SCRIPTS = tuple(
    sorted((metric for metric in METRICS if metric.of_scripts), key=lambda metric: get_args(Role).index(metric.role))
)
"""The metrics of user scripts, memory first."""


def _peak_of(phase: Phase) -> Metric:
    return next(metric for metric in METRICS if metric.peak_of == phase and not metric.part)


PEAK_OF_PHASE: Mapping[Phase, Metric] = {
    phase: _peak_of(phase) for phase in ("load", "apply", "store", "warmup", "run", "save")
}
"""The live peak of each phase, in the order in which a case runs through them."""


class _ByField(dict[str, Metric]):
    """Built-in metrics by field; custom metrics are added on first use."""

    def __missing__(self, field: str) -> Metric:
        metric = own_metric(field)
        if metric is None:
            raise KeyError(field)
        self[field] = metric
        return metric


METRIC_OF_FIELD: Mapping[str, Metric] = _ByField({metric.field: metric for metric in METRICS})


def known_metric(field: str) -> Metric | None:
    """Return the metric of a field; ``None`` for a field that is known only to another version of membench."""
    try:
        return METRIC_OF_FIELD[field]
    except KeyError:
        return None


def metrics_by_name(own: Iterable[Metric] = ()) -> dict[str, Metric]:
    """Return the built-in metrics and a suite's custom metrics by name."""
    return {metric.name: metric for metric in (*METRICS, *own)}


def own_metrics(fields: Iterable[str]) -> tuple[Metric, ...]:
    """Return the custom metrics among fields."""
    return tuple(METRIC_OF_FIELD[field] for field in sorted(set(fields)) if own_metric(field) is not None)


def metrics_with(fields: Iterable[str]) -> tuple[Metric, ...]:
    """Return the built-in metrics, and the custom metrics among fields."""
    return (*METRICS, *own_metrics(fields))


def is_of_held_out_text(metric: Metric) -> bool:
    """Whether a metric is judged over held-out text, which takes time of its own."""
    return metric.field in OF_HELD_OUT_TEXT or is_own(metric.field)


def is_possible_value(field: str, value: float) -> bool:
    """Whether a metric can have this value: zero, or a magnitude within the limits of its unit."""
    metric = known_metric(field)
    largest = metric.unit.largest if metric else units.LARGEST_VALUE
    return value == 0 or units.SMALLEST_VALUE <= abs(value) <= largest
