"""Prove what can be measured on this machine: allocate known amounts and compare each reading with the truth.

``membench doctor`` does that. With ``--full``, or as ``python -m membench.doctor``, it also measures the harness's own
promises: that results repeat, that training holds what arithmetic says, and what the harness and its observer cost.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from membench.errors import EXIT_CASES_FAILED, EXIT_OK
from membench.host import procfs
from membench.host.console import put
from membench.host.nvml import gpus
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.report.table_formats import DEFAULT, FORMATS
from membench.running.session import run, silent
from membench.suite.loading import load_suite
from membench.units import format_bytes, format_percent, format_seconds

_MIB = 2**20
_LLAMA_60M_PARAMETERS = 58_073_600

_KNOWN = """\
[suite]
name = "doctor"
[matrix]
model = ["touched", "untouched", "mapped"]
technique = ["none"]
workload = ["still"]
[[include]]
model = "small"
technique = "none"
workload = ["burst", "child"]
[model.touched]
use = "ballast"
[model.untouched]
use = "ballast"
kind = "untouched"
[model.mapped]
use = "ballast"
kind = "mapped"
[model.small]
use = "ballast"
mib = 1
[workload.still]
use = "burst"
mib = 0
[workload.child]
use = "burst"
mib = 64
hold_s = 0.3
in_child = true
[settings]
threads = 1
measured_steps = 2
"""

_GPU = """\
[suite]
name = "doctor-gpu"
[matrix]
model = ["touched"]
technique = ["none"]
workload = ["burst"]
device = ["cuda"]
[model.touched]
use = "ballast"
[settings]
threads = 1
measured_steps = 2
"""

_REPEATED = """\
[suite]
name = "doctor-repeats"
[matrix]
model = ["llama-60m"]
technique = ["none"]
workload = ["forward"]
[settings]
repeats = 5
measured_steps = 2
"""

_TRAINED = """\
[suite]
name = "doctor-train"
[matrix]
model = ["llama-60m"]
technique = ["none"]
workload = ["train"]
[settings]
measured_steps = 2
"""

_SMALL = """\
[suite]
name = "doctor-small"
[matrix]
model = ["llama-15m"]
technique = ["none"]
workload = ["short"]
[workload.short]
use = "forward"
sequence_length = 8
[settings]
repeats = 6
"""

_TIMED = """\
[suite]
name = "doctor-timed"
[matrix]
model = ["llama-15m"]
technique = ["none"]
workload = ["short"]
[workload.short]
use = "forward"
sequence_length = 64
[settings]
measured_steps = {steps}
calm_within_s = 0
"""
_TIMED_FOR_S = 10

Verdict = Literal["right", "OFF", "not measured", "too noisy to tell"]


@dataclass(frozen=True)
class Finding:
    """A reading and the truth. ``reading`` is ``None`` if nothing could be measured, and ``note`` says why."""

    what: str
    metric: str
    reading: str | None
    truth: str
    error: str
    allowed: str
    verdict: Verdict
    note: str = ""


def _records(text: str, tell: Callable[[str, Mapping[str, Any]], None] = silent) -> tuple[Record, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doctor.toml"
        path.write_text(text)
        return run(load_suite(path), output=folder, tell=tell).records


def _amount(record: Record, what: str, name: str, truth_bytes: int, of_bytes: int, allowed_percent: float) -> Finding:
    """Compare a metric of a record with the truth; the error is a share of ``of_bytes``."""
    value = record.metrics.get(name)
    allowed = format_percent(allowed_percent)
    if value is None:
        note = record.reasons.get(name) or record.message or "nothing was seen"
        return Finding(what, name, None, format_bytes(truth_bytes), "–", allowed, "OFF", note)
    percent = (value - truth_bytes) / of_bytes * 100
    return Finding(what, name, format_bytes(value), format_bytes(truth_bytes), f"{percent:+.3f}%", allowed,
                   "right" if abs(percent) <= allowed_percent else "OFF")  # fmt: skip


def known_amounts() -> list[Finding]:
    """Allocate known amounts with the same harness that runs suites, and compare."""
    touched, untouched, mapped, burst, child = sorted(_records(_KNOWN), key=lambda r: _ORDER.index(r.id))
    amount = 64 * _MIB
    return [
        _amount(touched, "64 MiB touched", "held_live_bytes", amount, amount, 0.5),
        _amount(touched, "64 MiB touched", "held_footprint_bytes", amount, amount, 5),
        _amount(touched, "64 MiB touched", "weights_bytes", amount, amount, 0),
        _amount(untouched, "64 MiB never touched", "held_live_bytes", 0, amount, 0.5),
        _amount(mapped, "64 MiB mapped from a file", "held_live_bytes", 0, amount, 0.5),
        _amount(mapped, "64 MiB mapped from a file", "held_footprint_bytes", amount, amount, 5),
        _amount(burst, "300 MiB for 1 ms, beside 1 MiB", "peak_live_bytes", 301 * _MIB, 301 * _MIB, 0.5),
        _amount(child, "64 MiB in a child for 0.3 s", "children_peak_bytes", amount, amount, 5),
        *_on_gpu(),
    ]


_ORDER = [f"{case}/cpu" for case in ("touched/none/still", "untouched/none/still", "mapped/none/still",
                                     "small/none/burst", "small/none/child")]  # fmt: skip


def _on_gpu() -> list[Finding]:
    found, reason = gpus()
    if found is None:
        return [Finding("300 MiB on the GPU", "peak_live_bytes", None, "–", "–", "–", "not measured", reason or "")]
    (record,) = _records(_GPU)
    truth = 364 * _MIB
    return [
        _amount(record, "300 MiB for 1 ms, beside 64 MiB, on the GPU", "peak_live_bytes", truth, truth, 0.5),
        _amount(record, "64 MiB on the GPU", "held_live_bytes", 64 * _MIB, 64 * _MIB, 0.5),
    ]


def promises() -> list[Finding]:
    """Measure the harness's own promises."""
    return [_repeats(), _training(), _cost_of_a_case(), _cost_of_observing(), _listing(), _own_memory()]


def _promise(what: str, value: float, most: float, show: Callable[[float], str], note: str = "") -> Finding:
    verdict: Verdict = "right" if value <= most else "OFF"
    return Finding(what, "", show(value), "", "", f"at most {show(most)}", verdict, note)


def _unproven(what: str, note: str, verdict: Verdict = "OFF") -> Finding:
    return Finding(what, "", None, "", "", "", verdict, note)


def _bad_end(records: tuple[Record, ...]) -> str | None:
    """Return why these cases prove nothing, if one of them did not end well."""
    return next((f"{r.id} ended as {r.status}: {r.message}" for r in records if r.status != "ok"), None)


def _repeats() -> Finding:
    what = "llama-60m five times: spread of live peaks"
    records = _records(_REPEATED)
    if bad := _bad_end(records):
        return _unproven(what, bad)
    peaks = [record.metrics.get("peak_live_bytes") for record in records]
    known = [peak for peak in peaks if peak is not None]
    if len(known) < len(peaks):
        return _unproven(what, records[0].reasons.get("peak_live_bytes", "no peak is known"))
    spread = (max(known) - min(known)) / statistics.median(known) * 100
    return _promise(what, spread, 0.2, lambda v: f"{v:.3f}%")


def _training() -> Finding:
    (record,) = _records(_TRAINED)
    truth = _LLAMA_60M_PARAMETERS * 16  # weights, gradients and AdamW's two states, in fp32
    return _amount(record, "AdamW training of llama-60m", "held_live_bytes", truth, truth, 3)


def _cost_of_a_case() -> Finding:
    """Measure the time outside the phases of a case: starting, rehearsing, settling and writing."""
    what = "what the harness adds to a case after the first"
    records = _records(_SMALL)
    if bad := _bad_end(records):
        return _unproven(what, bad)
    added = [
        record.duration_s - sum(phase.duration_s for process in record.processes for phase in process.phases)
        for record in records[1:]
    ]
    return _promise(what, statistics.median(added), 0.3, format_seconds, "llama-15m: duration less that of its phases")


class _Blinking:
    """Blocks the runner in its event handler in every other window of phase ``time``, so that it does not observe."""

    window_s = 0.25

    def __init__(self) -> None:
        self.began_at: float | None = None

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        if event == "phase":
            self.began_at = time.monotonic() if details["phase"] == "time" else None
        elif event == "memory" and self.began_at is not None:
            elapsed_s = time.monotonic() - self.began_at
            if self.window_of(elapsed_s) % 2:
                time.sleep(self.window_s - elapsed_s % self.window_s)

    def window_of(self, at_s: float) -> int:
        return int(at_s / self.window_s)


def _cost_of_observing() -> Finding:
    """Observe one worker in every other quarter of a second, and compare each such window with its two neighbours.

    Comparing two processes would not do: their steps differ by more than observing costs, depending on page placement.
    """
    what = "slowing of timed steps by observing, median of windows"
    records = _records(_TIMED.format(steps=20))
    if bad := _bad_end(records):
        return _unproven(what, bad)
    steps = math.ceil(_TIMED_FOR_S / statistics.median(records[0].processes[0].durations_s or ()))
    blinking = _Blinking()
    records = _records(_TIMED.format(steps=steps), blinking)
    if bad := _bad_end(records):
        return _unproven(what, bad)
    (process,) = records[0].processes
    timed, durations_s = process.phase("time"), process.durations_s or ()
    assert timed is not None, "the case ended well"
    return _slowing(what, timed.duration_s - sum(durations_s), durations_s, blinking)


def _slowing(what: str, at_s: float, durations_s: Sequence[float], blinking: _Blinking) -> Finding:
    """Compute how much longer steps take in observed windows, from the durations of steps that follow ``at_s``."""
    windows: dict[int, list[float]] = {}
    for duration_s in durations_s:
        window = blinking.window_of(at_s)
        if window == blinking.window_of(at_s + duration_s):
            windows.setdefault(window, []).append(duration_s)
        at_s += duration_s
    typical = {window: statistics.median(durations_s) for window, durations_s in windows.items()}
    percents = sorted(
        (2 * typical[window] / (typical[window - 1] + typical[window + 1]) - 1) * 100
        for window in typical
        if window % 2 == 0 and {window - 1, window + 1} <= typical.keys()
    )
    # In 95 of 100 such series the true median lies between these ranks, whatever the distribution is.
    middle, reach = (len(percents) - 1) / 2, 0.98 * len(percents) ** 0.5
    if reach > middle:
        return _unproven(what, f"{len(percents)} windows are too few for an interval", "too noisy to tell")
    low, high = percents[round(middle - reach)], percents[round(middle + reach)]
    verdict: Verdict = "right" if high <= 1 else "OFF" if low > 1 else "too noisy to tell"
    return Finding(what, "", f"{statistics.median(percents):.2f}%", "", "", "at most 1.00%", verdict,
                   f"{len(percents)} windows, 95% interval {low:.2f}% to {high:.2f}%")  # fmt: skip


def _listing() -> Finding:
    durations = []
    for _ in range(5):
        began = time.perf_counter()
        ran = subprocess.run([sys.executable, "-P", "-m", "membench", "list"], capture_output=True, text=True)
        durations.append(time.perf_counter() - began)
        if ran.returncode:
            return _unproven("membench list", ran.stderr.strip().rpartition("\n")[2])
    return _promise("membench list", statistics.median(durations), 0.5, format_seconds)


def _own_memory() -> Finding:
    """Check the memory of this process, which was the runner of all cases above."""
    what = "the runner's own memory"
    if "torch" in sys.modules:
        return _unproven(what, "torch is imported")
    return _promise(what, procfs.resident().peak_bytes, 100e6, format_bytes, "torch is not imported")


def table(findings: list[Finding], form: str) -> str:
    """Render the findings as a table, a row each."""
    rows: list[dict[str, Any]] = [
        {
            "what": finding.what,
            "metric": METRIC_OF_FIELD[finding.metric].name if finding.metric else "",
            "reading": finding.reading or "–",
            "truth": finding.truth,
            "error": finding.error,
            "allowed": finding.allowed,
            "": finding.verdict,
            "note": FORMATS[form].cell(finding.note),
        }
        for finding in findings
    ]
    return FORMATS[form].render(rows)


def report(*, full: bool, form: str = DEFAULT) -> int:
    """Print the findings and return the exit code: 1 if one is off. Findings that were not measured do not count."""
    findings = known_amounts()
    if full:
        findings += promises()
    put(table(findings, form), coded=FORMATS[form].coded)
    return EXIT_CASES_FAILED if any(finding.verdict == "OFF" for finding in findings) else EXIT_OK
