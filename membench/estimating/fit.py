"""Which stacks of techniques make a model fit into the memory of some devices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from membench.errors import SuiteError
from membench.estimating import devices, known_costs, stacks
from membench.estimating.devices import Budget
from membench.estimating.known_costs import KnownCost
from membench.estimating.lanes import Submit, lanes
from membench.estimating.stacks import Free, Stack, Workload
from membench.plugins import Model, registry
from membench.plugins.options import Unsuitable
from membench.protocol.case import REFERENCE, Case, Plugin
from membench.records.record import Record
from membench.running.jobs.estimate import EstimateJob, estimate_from_case
from membench.running.session import silent
from membench.suite.schema import Settings

Tell = Callable[[str, Mapping[str, Any]], None]
PEAK = "peak_live_bytes"
_TIMEOUT_S = 900.0
_CONFIRMED, _ENLARGED = 2, 4
_MOST_ROWS, _MOST_GUESSES = 65_536, 7
_DEFAULT_LENGTH = 2048
_QUICK_S = 15
"""Stacks whose estimate took longer, such as those that quantize, are not estimated again with other sizes."""
_LENGTH_STEP = 64
_SETTINGS = Settings.model_validate({"evaluate_s": 0, "timeout_s": _TIMEOUT_S})
Verdict = Literal["fits", "too large", "unknown"]


@dataclass(frozen=True)
class Outcome:
    """What is known of a stack.

    Attributes:
        needed_bytes: of the device that needs the most: the live peak of a step. If it was not traced, what weights,
            gradients and optimizer states take at least; ``None``: nothing is known.
        part: of the step, in which the peak occurs.
        how: how the figure was obtained.
        reason: why nothing is known.
        largest: how far the free number may grow while it fits; ``None``: not looked for.
        is_at_least: whether it may grow further than ``largest``, which was not looked for.
        seconds: how long the estimate took.
        known: what kept runs know of the stack, or of its members.
    """

    stack: str
    verdict: Verdict
    needed_bytes: int | None = None
    part: str | None = None
    how: str = ""
    reason: str | None = None
    largest: int | None = None
    is_at_least: bool = False
    seconds: float = 0.0
    known: Mapping[str, Sequence[KnownCost]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """The answer of a search.

    Attributes:
        free: which number ``largest`` is of.
        outcomes: of all stacks, those that fit first, best first; then those that nearly fit.
        searched_s: how long it took to try all stacks.
        seconds: how long all of it took, confirming and enlarging the best ones, too.
        not_tried: what was not.
    """

    model: str
    budget: Budget
    workload: Workload
    free: Free
    outcomes: tuple[Outcome, ...]
    searched_s: float
    seconds: float
    not_tried: str = stacks.NOT_TRIED

    @property
    def fitting(self) -> list[Outcome]:
        """Return the stacks that fit, best first."""
        return [each for each in self.outcomes if each.verdict == "fits"]

    def left_bytes(self, outcome: Outcome) -> int | None:
        """Return what a stack leaves on each device; negative if it does not fit."""
        return None if outcome.needed_bytes is None else self.budget.per_device_bytes - outcome.needed_bytes


def fit(
    model: str,
    *,
    device: str | None = None,
    memory: str | None = None,
    workload: Literal["train", "forward", "generate"] = "train",
    batch_size: int | None = None,
    length: int | None = None,
    free: Free | None = None,
    runs: Sequence[Path] = (),
    tell: Tell = silent,
) -> Fit:
    """Search the stacks of techniques that make a model fit.

    A step of each is traced on fake tensors, deep models' with few layers; the best are confirmed with all layers, and
    the free number of these is enlarged as far as it fits.

    Args:
        model: its name, the path of a ``config.json`` of transformers or of its folder, or ``package.module:function``.
        device: such as ``RTX-4090`` or ``8xH100-80GB``.
        memory: of one device, such as ``24GB``, instead of ``device``; all of it counts as usable. With a count before
            it, of each of several: ``8x80GB``.
        batch_size: rows of a step over all devices; by default, one a device.
        length: tokens of a sequence, or of prompt and reply; by default 2,048, or fewer if the model takes fewer.
        free: what may grow; by default the batch, or in ``generate`` the context.
        runs: files of runs that know what techniques cost.
        tell: called with the name and details of each event: ``searching`` (``tried``, ``of``, ``fits``, ``best``),
            ``confirming`` and ``enlarging`` (``stack``).

    Raises:
        SuiteError: if model, device or numbers are wrong.
        PluginError: if there is no such model.
        ResultsError: if a file is not a run.
    """
    began = time.monotonic()
    searched = Question.asked(model, device, memory, workload, batch_size, length)
    known = known_costs.known_costs(runs)
    found = _Search(searched, free or ("context" if workload == "generate" else "batch"), known, tell).run()
    return dataclasses.replace(found, seconds=time.monotonic() - began)


@dataclass(frozen=True)
class Question:
    """A model, what it is to do, and on which devices."""

    name: str
    model: Plugin
    most_tokens: int | None
    budget: Budget
    workload: Workload

    @classmethod
    def asked(
        cls,
        model: str,
        device: str | None,
        memory: str | None,
        workload: str,
        batch_size: int | None,
        length: int | None,
    ) -> Question:
        """Return the question that arguments of ``fit`` ask.

        Raises:
            SuiteError, PluginError: as for ``fit``.
        """
        if (device is None) == (memory is None):
            raise SuiteError("name either the devices, as 8xH100-80GB, or the memory of one, as 24GB")
        budget = devices.parse(device) if device else _of_memory(str(memory))
        plugin = _model(model)
        made: Model = registry.create("model", plugin.use, plugin.options)
        if problem := made.check():
            raise SuiteError(f"model '{model}': {problem}")
        most = made.max_tokens()
        if length is not None and most is not None and length > most:
            raise SuiteError(f"sequence length {length:,}: the model takes {most:,} tokens at most")
        work = Workload(workload, batch_size or budget.count, length or min(_DEFAULT_LENGTH, most or _DEFAULT_LENGTH))
        name = Path(model).parent.name if Path(model).name == "config.json" else Path(model).name
        return cls(name or model, plugin, most, budget, work)

    def job(self, stack: Stack, workload: Workload, *, extrapolates: bool) -> EstimateJob:
        """Return the job that estimates a stack."""
        kind = "cuda" if self.budget.count == 1 else f"{self.budget.count}xcuda"
        case = Case(self.name, stack.name, workload.kind, kind, self.model, stack.plugins, workload.plugin)
        return dataclasses.replace(estimate_from_case(case, 0, _SETTINGS), extrapolates=extrapolates)


def _of_memory(text: str) -> Budget:
    count, times, size = text.partition("x")
    return devices.of_memory(size, int(count)) if times and count.isdigit() else devices.of_memory(text)


def _model(text: str) -> Plugin:
    path = Path(text).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return Plugin("config", {"source": text})
    if ":" in text:
        return Plugin("factory", {"function": text})
    registry.find("model", text)
    return Plugin(text)


class _Search:
    """A search among all stacks."""

    def __init__(self, question: Question, free: Free, known: Mapping[str, Sequence[KnownCost]], tell: Tell) -> None:
        self._asked, self._free, self._known, self._tell = question, free, known, tell
        self._usable_bytes = question.budget.per_device_bytes
        self._found: dict[str, Outcome] = {}
        self._stacks = {stack.name: stack for stack in stacks.candidates(question.workload, question.budget.count)}
        self._jobs = {
            name: question.job(stack, question.workload, extrapolates=True) for name, stack in self._stacks.items()
        }

    def run(self) -> Fit:
        asked = self._asked
        with lanes(list(self._jobs.values())) as submit:
            began = time.monotonic()
            self._estimate_all(submit)
            searched_s = time.monotonic() - began
            self._confirm(submit)
            self._enlarge(submit)
        return Fit(asked.name, asked.budget, asked.workload, self._free, tuple(self._sorted()), searched_s, 0.0)

    def _parameters(self, record: Record) -> int | None:
        """Return how many parameters the model has, of which this is the estimate without any technique."""
        weights = record.metrics.get("weights_bytes")
        if weights is None and record.status != "ok":
            raise SuiteError(f"model '{self._asked.name}' cannot be estimated: {record.message}")
        return None if weights is None else int(weights // 4)

    def _estimate_all(self, submit: Submit) -> None:
        alone = dataclasses.replace(self._asked, budget=dataclasses.replace(self._asked.budget, count=1))
        reference = submit(alone.job(Stack.of(REFERENCE), self._asked.workload, extrapolates=True))
        parameters = self._parameters(reference.result())
        least: dict[str, int] = {}
        for stack in self._stacks.values():
            try:
                least[stack.name] = stack.least_bytes(parameters or 0, self._asked.workload, self._asked.budget.count)
            except Unsuitable as error:
                self._found[stack.name] = Outcome(stack.name, "unknown", reason=str(error))
        how = "arithmetic: weights, gradients and optimizer states alone"
        too_large = {name: size for name, size in least.items() if size > self._usable_bytes}
        self._found |= {name: Outcome(name, "too large", size, how=how) for name, size in too_large.items()}
        # Those first that are likely to fit.
        names = sorted(least.keys() - too_large.keys(), key=lambda name: (least[name], name))
        waiting = {reference if name == REFERENCE else submit(self._jobs[name]): name for name in names}
        while waiting:
            self._say_how_far()
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                name = waiting.pop(future)
                self._found[name] = self._outcome(name, future.result())
        self._say_how_far()

    def _outcome(self, name: str, record: Record) -> Outcome:
        needed = record.metrics.get(PEAK)
        if record.status != "ok" or needed is None:
            return Outcome(name, "unknown", reason=record.message or record.status)
        (process,) = record.processes
        return Outcome(
            name,
            "fits" if needed <= self._usable_bytes else "too large",
            int(needed),
            process.peak_part,
            str(record.obtained[PEAK].get("source", "")).partition(";")[0],
            seconds=record.duration_s,
            known={each: self._known[each] for each in (name, *name.split("+")) if each in self._known},
        )

    def _say_how_far(self) -> None:
        fitting = self._fitting()
        best = fitting[0] if fitting else None
        self._tell(
            "searching", {"tried": len(self._found), "of": len(self._stacks), "fits": len(fitting), "best": best}
        )

    def _sorted(self) -> list[Outcome]:
        """Return what fits by what it costs; then what does not by what it needs; then what is not known."""
        others = [each for each in self._found.values() if each.verdict != "fits"]
        return [
            *self._fitting(),
            *sorted(others, key=lambda each: (each.verdict == "unknown", each.needed_bytes or 0)),
        ]

    def _fitting(self) -> list[Outcome]:
        def place(outcome: Outcome) -> tuple[Any, ...]:
            quality = known_costs.quality_rank(outcome.stack, self._known)
            return quality, len(self._stacks[outcome.stack].members), outcome.needed_bytes

        return sorted((each for each in self._found.values() if each.verdict == "fits"), key=place)

    def _confirm(self, submit: Submit) -> None:
        """Trace the best stacks with all layers; one that then does not fit is no longer among them."""
        checked: set[str] = set()
        while True:
            best = [each.stack for each in self._fitting()[:_CONFIRMED]]
            left = [name for name in best if name not in checked and "extrapolated" in self._found[name].how]
            if not left:
                return
            for name in left:
                self._tell("confirming", {"stack": name})
            jobs = {n: submit(self._asked.job(self._stacks[n], self._asked.workload, extrapolates=False)) for n in left}
            for name, future in jobs.items():
                checked.add(name)
                confirmed = self._outcome(name, future.result())
                self._found[name] = dataclasses.replace(confirmed, seconds=self._found[name].seconds)

    def _enlarge(self, submit: Submit) -> None:
        """Find how far the free number of the best stacks may grow."""
        best = [each.stack for each in self._fitting() if each.seconds <= _QUICK_S][:_ENLARGED]
        for name in best:
            self._tell("enlarging", {"stack": name})
        searches = {name: self._enlarging(name) for name in best}
        needed: dict[str, int | None] = dict.fromkeys(best)
        while needed:
            futures = {}
            for name, size_bytes in needed.items():
                try:
                    futures[name] = submit(self._job_of_size(name, searches[name].send(size_bytes)))
                except StopIteration as stop:
                    largest, is_at_least = stop.value
                    self._found[name] = dataclasses.replace(self._found[name], largest=largest, is_at_least=is_at_least)
            needed = {name: self._outcome(name, future.result()).needed_bytes for name, future in futures.items()}

    def _job_of_size(self, name: str, size: int) -> EstimateJob:
        workload = self._asked.workload
        if self._free == "batch":
            workload = dataclasses.replace(workload, batch_size=size)
        else:
            workload = dataclasses.replace(workload, length=size)
        return self._asked.job(self._stacks[name], workload, extrapolates=True)

    def _enlarging(self, name: str) -> Generator[int, int | None, tuple[int, bool]]:
        """Yield sizes to estimate and be sent the bytes of; return the largest that fits, and whether more may.

        What is needed grows evenly with the rows, and evenly or faster with the tokens: the next guess lies on the line
        through the last two.
        """
        workload = self._asked.workload
        if self._free == "batch":
            step, size, most = max(1, self._asked.budget.count), workload.batch_size, _MOST_ROWS
        else:
            step, size, most = _LENGTH_STEP, workload.length, self._asked.most_tokens or 1 << 20
        fits, needed = size, self._found[name].needed_bytes or 0
        too_large: int | None = None
        guess, points = 2 * size, [(size, needed)]
        for _ in range(_MOST_GUESSES):
            guess = min(guess - guess % step if guess > step else step, most)
            if guess <= fits or (too_large is not None and guess >= too_large):
                break
            found = yield guess
            if found is None:
                break
            points.append((guess, found))
            if found <= self._usable_bytes:
                fits = guess
            else:
                too_large = guess
            guess = self._next_guess(points, fits, too_large, step)
        is_whole = too_large is not None and too_large - fits <= step
        return fits, not (is_whole or fits >= most)

    def _next_guess(self, points: list[tuple[int, int]], fits: int, too_large: int | None, step: int) -> int:
        (first, first_bytes), (second, second_bytes) = points[-2:]
        slope = (second_bytes - first_bytes) / (second - first)
        guess = second + int((self._usable_bytes - second_bytes) / slope) if slope > 0 else 2 * second
        if too_large is not None and guess >= too_large:
            guess = too_large - step
        return max(guess, fits + step)
