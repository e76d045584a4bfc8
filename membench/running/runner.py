"""Runs cases one after the other, each in a process of its own, and turns whatever happens into records."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from membench.host import environment, procfs
from membench.host.nvml import gpus
from membench.plugins import registry
from membench.records.case import REFERENCE, Case, Plugin
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record, Status
from membench.running import program_ending
from membench.running.deriving import Figures, figures, figures_of_calls, figures_of_program
from membench.running.fork_client import Ended, Nursery, NurseryLost
from membench.running.marked_phases import MOST_PHASES, MarkedPhases
from membench.running.observer import Observer
from membench.suite.schema import Settings

_TAIL_BYTES = 4096
_PREPARE_TIMEOUT_S = 1800
_STREAMS = (0, 1)
"""What a user's program has as its standard input and output: ours."""
_SHARE_OF_LOOKING = 0.1
"""While steps are timed, of one core: a look at children walks their page tables, and takes milliseconds for each."""

Tell = Callable[[str, Mapping[str, Any]], None]


class Interrupted(KeyboardInterrupt):
    """A program was interrupted; what had been measured of it is in the record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record


class Turn(Protocol):
    """Says when a case may go on where several runners share a machine. Each method waits until it may."""

    def share(self) -> None:
        """Work beside others, but not beside one that is alone."""

    def alone(self) -> None:
        """Work while no other does."""

    def leave(self) -> None:
        """Work no more."""


@dataclass(frozen=True)
class Call:
    """A function of the user's to be measured, and the names that its record gets.

    Attributes:
        pickled: the file of function, arguments and surroundings, as ``membench.worker.function`` reads it.
        raised: the file that an exception of the function is left in, as it writes it.
    """

    id: str
    model: str
    workload: str
    device: str
    pickled: Path
    raised: Path


@dataclass
class _Outcome:
    """What is known of a worker so far."""

    pid: int | None = None
    waited_s: float = 0.0
    observer: Observer | None = None
    status: Status | None = None
    phase: str | None = None
    message: str | None = None
    baseline: Mapping[str, int] | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    gpu: Mapping[str, Any] | None = None
    gpu_unknown: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    tail: bytes = b""
    done: bool = False
    marked: MarkedPhases | None = None
    interrupted: bool = False


class Runner:
    """Runs cases with one fork server. Use as a context manager."""

    def __init__(
        self,
        cases: tuple[Case, ...],
        settings: Settings,
        references: Path,
        tell: Tell,
        machine: Mapping[str, Any] | None = None,
        *,
        turn: Turn | None = None,
        variables: Mapping[str, str] | None = None,
        modules: Sequence[str] = (),
        calls_on_gpu: bool = False,
        folders: Mapping[str, str] | None = None,
    ) -> None:
        """Make ready; nothing is started before the first case.

        Args:
            references: the folder in which the logits of reference cases are kept.
            machine: its description, if it has been made already.
            turn: asked before a case begins and around what is timed, if others measure on this machine.
            variables: of the environment, for workers alone.
            modules: what the fork server imports besides what the cases need.
            calls_on_gpu: whether ``run_call`` will be asked for one.
            folders: as ``foreign.refuse_imported`` has them.
        """
        self._folders = folders
        self._turn = turn
        self._variables = variables
        self._references = references
        self._settings = settings
        self._tell = tell
        self._runs_programs = any(case.command for case in cases)
        self._threads = None if self._runs_programs else settings.threads or environment.usable_cores()
        can_preload = settings.isolation == "fork" and not self._runs_programs
        self._preload = sorted({*_modules_of(cases), *modules}) if can_preload else []
        self._nursery: Nursery | None = None
        on_gpu = calls_on_gpu or any(case.device.startswith("cuda") for case in cases)
        self.machine = machine or environment.describe(self._threads, with_gpus=on_gpu)
        self._gpus, self._no_gpus = gpus() if on_gpu else (None, None)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def begin_afresh(self) -> None:
        """End the fork server: the next case comes out of a new one, as that of another run does."""
        self._close()

    def _close(self) -> None:
        if self._nursery:
            self._nursery.close()
            self._nursery = None

    def _home(self) -> Nursery:
        if self._nursery is None:
            self._nursery = Nursery(self._preload, self._threads, self._variables)
        self._nursery.wait_until_ready()
        return self._nursery

    def prepare(self, case: Case) -> str | None:
        """Let a case's model do what it does once; the reason if that failed."""
        if case.command:
            return None
        request = {"prepare": True, "device": "cpu", "isolation": self._settings.isolation,
                   "model": _asked(case.model_plugin)}  # fmt: skip
        outcome = self._watch(request, _PREPARE_TIMEOUT_S)
        return None if outcome.status == "ok" else f"preparing the model ended as {outcome.status}: {outcome.message}"

    def run_case(self, case: Case, repeat: int, limits: Mapping[str, float], not_ready: str | None = None) -> Record:
        """Measure one case; always a record, whatever becomes of the worker.

        Args:
            limits: by metric field.
            not_ready: what ``prepare`` said; the case is then ``failed`` without being started.

        Raises:
            Interrupted: if a user's program was, with its record.
        """
        began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        if case.command:
            outcome = self._watch({"command": case.command, "device": case.device}, self._settings.timeout_s)
        elif not_ready:
            outcome = _Outcome(status="failed", message=not_ready)
        else:
            request = {
                "device": case.device,
                "isolation": self._settings.isolation,
                "threads": self._threads,
                "settings": self._settings.model_dump(),
                "model": _asked(case.model_plugin),
                "techniques": [_asked(technique) for technique in case.technique_plugins],
                "members": case.technique.split("+"),
                "workload": _asked(case.workload_plugin),
                "folders": self._folders,
                "metrics": {field: _asked(plugin) for field, plugin in case.metric_plugins.items()},
                "reference": {
                    "path": str(self._references / f"{_file_name(case.group)}.npy"),
                    "is_this": case.technique == REFERENCE,
                },
            }
            outcome = self._watch(request, self._settings.timeout_s)
        names: dict[str, Any] = {
            "model": case.model,
            "technique": case.technique,
            "workload": case.workload,
            "device": case.device,
            "model_plugin": _named(case.model_plugin),
            "technique_plugins": [_named(technique) for technique in case.technique_plugins],
            "workload_plugin": _named(case.workload_plugin),
        }
        if case.metric_plugins:
            names["metric_plugins"] = {field: _named(plugin) for field, plugin in case.metric_plugins.items()}
        duration_s = time.monotonic() - began - outcome.waited_s
        work_out = figures_of_program if case.command else figures
        record = self._record(names, case.id, repeat, outcome, work_out, limits, started_at, duration_s)
        if outcome.interrupted:
            raise Interrupted(record)
        return record

    def run_call(self, call: Call, repeat: int, limits: Mapping[str, float]) -> Record:
        """Measure a function of the user's in phases like those of a case; always a record."""
        began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        request = {
            "device": call.device,
            "isolation": self._settings.isolation,
            "threads": self._threads,
            "settings": self._settings.model_dump(),
            "pickled": str(call.pickled),
            "raised": str(call.raised),
        }
        outcome = self._watch(request, self._settings.timeout_s)
        # No technique is applied, and it stands alone: it is its own reference.
        names = {"model": call.model, "technique": REFERENCE, "workload": call.workload, "device": call.device}
        duration_s = time.monotonic() - began - outcome.waited_s
        return self._record(names, call.id, repeat, outcome, figures_of_calls, limits, started_at, duration_s)

    def _record(
        self,
        names: Mapping[str, Any],
        id: str,
        repeat: int,
        outcome: _Outcome,
        work_out: Callable[..., Figures],
        limits: Mapping[str, float],
        started_at: str,
        duration_s: float,
    ) -> Record:
        assert outcome.status is not None
        found = work_out(
            outcome.phases,
            outcome.result,
            outcome.status,
            names["device"].startswith("cuda"),
            self._settings.sampling_interval_s,
            outcome.baseline,
        )
        return Record(
            case=names,
            id=id,
            repeat=repeat,
            status=outcome.status,
            ended_in=outcome.phase,
            message=outcome.message,
            started_at=started_at,
            duration_s=round(duration_s, 4),
            metrics=found.metrics,
            reasons=found.reasons,
            obtained=found.obtained,
            processes=(_process(names["device"], outcome),),
            remarks=(*outcome.result.get("remarks", ()), *_unchecked_limits(found, outcome.status, limits)),
            notes=tuple(outcome.result.get("notes", ())),
            broken_limits=_broken_limits(found, limits),
            timeline=outcome.observer.timeline() if outcome.observer else {},
            output_tail="" if outcome.status in ("ok", "skipped") else outcome.tail.decode(errors="replace"),
            machine=self.machine,
            settings=self._settings.model_dump(),
        )

    def _watch(self, request: Mapping[str, Any], timeout_s: float) -> _Outcome:
        """Start a worker and follow it to its end."""
        outcome = _Outcome()
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        home: Nursery | None = None
        try:
            with ours:
                self._take_turn(outcome)
                oom_kills_before = procfs.oom_kills()
                home = self._home()
                # The idle level of the GPUs is read here, before the worker touches one.
                idle = self._gpus.used_bytes() if self._gpus else {}
                is_program = "command" in request
                began_at_s = time.monotonic()
                outcome.pid = home.start(request, theirs, write_end, _STREAMS if is_program else ())
                theirs.close()
                os.close(write_end)
                write_end = -1
                outcome.observer = observer = Observer(outcome.pid, self._gpus, idle)
                if is_program:
                    if request["device"].startswith("cuda"):
                        outcome.gpu_unknown = self._no_gpus or observer.use_gpu_of(request["device"])
                    outcome.marked = MarkedPhases(outcome.pid, observer)
                ended, timed_out = self._followed(home, outcome, observer, ours, read_end, timeout_s)
            if outcome.marked:
                _settle(outcome, outcome.marked, ended, began_at_s)
            _judge(outcome, timed_out, timeout_s, ended.status, oom_kills_before)
            if outcome.marked and outcome.message and (said := program_ending.last_line(outcome.tail)):
                outcome.message += f": {said}"
        except NurseryLost as error:
            # Something killed the fork server, the kernel for want of memory perhaps: the next case gets a new one.
            self._close()
            killed = None not in (oom_kills_before, procfs.oom_kills()) and procfs.oom_kills() != oom_kills_before
            outcome.status = "out-of-memory" if killed else "crashed"
            outcome.message = str(error)
        except BaseException:
            if home:
                home.kill()
            raise
        finally:
            if self._turn:
                self._turn.leave()
            theirs.close()
            if outcome.observer:
                outcome.observer.close()
            if write_end >= 0:
                os.close(write_end)
            os.close(read_end)
        return outcome

    def _followed(
        self, home: Nursery, outcome: _Outcome, observer: Observer, pipe: socket.socket, output: int, timeout_s: float
    ) -> tuple[Ended, bool]:
        """``_follow``, to the end even if it is interrupted, where it is a user's program: its record is kept."""
        try:
            return self._follow(home, outcome, observer, pipe, output, timeout_s)
        except KeyboardInterrupt:
            if outcome.marked is None:
                raise
            outcome.interrupted = True
            home.kill()
            return self._follow(home, outcome, observer, pipe, output, timeout_s)

    def _follow(
        self, home: Nursery, outcome: _Outcome, observer: Observer, pipe: socket.socket, output: int, timeout_s: float
    ) -> tuple[Ended, bool]:
        """Hear and observe a worker until it is gone: how it ended, and whether it had to be killed."""
        deadline = time.monotonic() - outcome.waited_s + timeout_s
        buffer, timed_out = b"", False
        ended: Ended | None = None
        rests_until = 0.0
        sources = [home.fileno(), pipe.fileno(), output]
        while ended is None or pipe.fileno() in sources or (outcome.marked and output in sources):
            ready, _, _ = select.select(sources, [], [], self._settings.sampling_interval_s)
            if output in ready:
                data = os.read(output, 65536)
                outcome.tail = (outcome.tail + data)[-_TAIL_BYTES:]
                if outcome.marked:
                    _pass_on(data)
                if not data:
                    sources.remove(output)
            if pipe.fileno() in ready:
                try:
                    data = pipe.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    sources.remove(pipe.fileno())
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line), outcome, observer, pipe)
            if ended is None and home.fileno() in ready:
                ended = home.ended()
                sources.remove(home.fileno())
            if ended is None and (began := time.monotonic()) >= rests_until:
                held = observer.look()
                if held is not None:
                    self._tell("memory", {"bytes": held})
                if outcome.phase == "time":
                    rests_until = began + (time.monotonic() - began) / _SHARE_OF_LOOKING
            if not timed_out and ended is None and time.monotonic() - outcome.waited_s > deadline:
                timed_out = True
                home.kill()
        return ended, timed_out

    def _take_turn(self, outcome: _Outcome, alone: bool = False) -> None:
        if self._turn is None:
            return
        asked_at = time.monotonic()
        (self._turn.alone if alone else self._turn.share)()
        outcome.waited_s += time.monotonic() - asked_at

    def _hear(self, message: Mapping[str, Any], outcome: _Outcome, observer: Observer, pipe: socket.socket) -> None:
        match message["event"]:
            case "begin":
                self._take_turn(outcome, alone=message["phase"] == "time")
                outcome.phase = message["phase"]
                observer.begin_phase()
                self._tell("phase", {"phase": message["phase"]})
            case "end":
                seen = observer.end_phase()
                unknown = outcome.gpu_unknown or seen["gpu_unknown"]
                outcome.phases.append({**message["phase"], **seen, "gpu_unknown": unknown})
                self._take_turn(outcome)
            case "enter" | "leave" if outcome.marked:
                if message["event"] == "enter":
                    self._tell("phase", {"phase": outcome.marked.enter(message["phase"])})
                else:
                    outcome.marked.leave(message["phase"], message["raised"])
            case "baseline":
                outcome.baseline = message["baseline"]
                held = message["baseline"]["anonymous_bytes"] + message["baseline"]["file_bytes"]
                self._tell("baseline", {"bytes": held})
            case "device":
                outcome.gpu = {key: value for key, value in message.items() if key != "event"}
                outcome.gpu_unknown = observer.use_gpu(message["uuid"]) or self._no_gpus
            case "result":
                outcome.result = message["result"]
            case "status":
                outcome.status, outcome.message = message["status"], message["message"]
                outcome.phase = message.get("phase", outcome.phase)
            case "done":
                outcome.done = True
            case "progress":
                self._tell("progress", message)
        if message["event"] in ("begin", "end", "enter", "leave"):
            with contextlib.suppress(OSError):
                pipe.sendall(b"go\n")


def _pass_on(data: bytes) -> None:
    """Write what a user's program wrote to its standard error to ours."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def _settle(outcome: _Outcome, marked: MarkedPhases, ended: Ended, began_at_s: float) -> None:
    """What a user's program took, and how it ended unless a signal or the clock ended it."""
    said = program_ending.last_line(outcome.tail)
    outcome.phase = marked.ended_in(said)
    outcome.phases = marked.end(ended.at_s, ended.peak_bytes, ended.forked_from_bytes)
    for phase in outcome.phases:
        phase["gpu_unknown"] = phase.get("gpu_unknown") or outcome.gpu_unknown
    outcome.result = {
        "durations_s": [ended.at_s - began_at_s],
        "exit_code": os.WEXITSTATUS(ended.status) if os.WIFEXITED(ended.status) else None,
        "had_children": ended.had_children,
        "remarks": [
            *program_ending.told_of(ended.left),
            *([f"of the phases it marks only the first {MOST_PHASES} are kept"] if marked.left_out else []),
        ],
    }
    if outcome.interrupted:
        outcome.status, outcome.message = "crashed", "interrupted"
    elif found := program_ending.judged(ended.status, said):
        outcome.status, outcome.message = found
    else:
        outcome.done = os.WIFEXITED(ended.status)


def _judge(outcome: _Outcome, timed_out: bool, timeout_s: float, exited: int, oom_kills_before: int | None) -> None:
    """Settle the status of a worker that is gone, unless it told it itself."""
    if outcome.status is not None:
        return
    if outcome.done:
        outcome.status, outcome.phase = "ok", None
    elif timed_out:
        outcome.status, outcome.message = "timeout", f"not done after {timeout_s:g} s"
    elif os.WIFSIGNALED(exited):
        number = os.WTERMSIG(exited)
        oom_kills = procfs.oom_kills()
        if number == signal.SIGKILL and None not in (oom_kills, oom_kills_before) and oom_kills != oom_kills_before:
            outcome.status, outcome.message = "out-of-memory", "killed by the kernel for want of memory"
        else:
            outcome.status, outcome.message = "crashed", f"killed by {signal.Signals(number).name}"
    else:
        outcome.status = "crashed"
        outcome.message = f"ended with exit code {os.WEXITSTATUS(exited)} before it was done"


def _named(plugin: Plugin) -> dict[str, Any]:
    """A plug-in as its record has it."""
    # By the fingerprint a comparison tells that the same name has become something else.
    own = {"file": plugin.file.name, "sha256": plugin.file.sha256[:12]} if plugin.file else {}
    return {"use": plugin.use, "options": dict(plugin.options), **own}


def _asked(plugin: Plugin) -> dict[str, Any]:
    """A plug-in as its worker is told it."""
    own = {"file": dataclasses.asdict(plugin.file)} if plugin.file else {}
    return _named(plugin) | own


def _file_name(group: tuple[str, str, str]) -> str:
    model, workload, device = group
    # A colon has no place in names of files on every disk; '@' and ',' have none in the names of plug-ins.
    return ",".join((model.replace(":", "@"), workload.replace(":", "@"), device.replace(":", "")))


def _modules_of(cases: tuple[Case, ...]) -> list[str]:
    """The modules that the fork server imports for these cases."""
    modules = {"membench.worker.main", "safetensors.torch"}
    for case in cases:
        for kind, plugin in case.plugins:
            modules |= set(registry.find(kind, plugin.use, plugin.files).loaded.imports)
    return sorted(modules)


def _process(device: str, outcome: _Outcome) -> dict[str, Any]:
    """The entry of a case's only process so far; parallel techniques will have one a rank."""
    of_program = {"exit_code": outcome.result.get("exit_code")} if outcome.marked else {}
    return {
        "role": "worker" if outcome.marked is None else "script",
        "rank": 0,
        "device": device,
        "pid": outcome.pid,
        "gpu": outcome.gpu,
        "baseline": outcome.baseline,
        "phases": outcome.phases,
        "durations_s": outcome.result.get("durations_s"),
        "waited_s": outcome.result.get("waited_s"),
        "corpus": outcome.result.get("corpus"),
        "losses_nats": outcome.result.get("losses_nats"),
        "modules_bytes": outcome.result.get("modules_bytes"),
        "breakdown_bytes": outcome.result.get("breakdown_bytes"),
        "peak_part": outcome.result.get("peak_part"),
        "quality": outcome.result.get("quality"),
        **of_program,
    }


def _unchecked_limits(found: Figures, status: str, limits: Mapping[str, float]) -> list[str]:
    """A limit that nothing was held against must not look kept."""
    if status != "ok":
        return []
    return [
        f"the limit on {METRIC_OF_FIELD[name].name} was not checked: "
        + found.reasons.get(name, "the case has no such figure")
        for name in limits
        if found.metrics.get(name) is None
    ]


def _broken_limits(found: Figures, limits: Mapping[str, float]) -> tuple[str, ...]:
    broken = []
    for name, limit in limits.items():
        value, metric = found.metrics.get(name), METRIC_OF_FIELD[name]
        if value is not None and (value > limit if metric.better == "lower" else value < limit):
            side = "over" if metric.better == "lower" else "under"
            broken.append(f"{metric.name} {metric.format(value)} is {side} its limit of {metric.format(limit)}")
    return tuple(broken)
