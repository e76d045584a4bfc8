"""Runs cases one after the other, each in a process of its own, and turns whatever happens into records."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from membench import environment, plugins, procfs
from membench.errors import MembenchError
from membench.observer import Gpu, Observer, gpu_observer
from membench.record import METRICS, Case, Plugin, Record, Status
from membench.suite import Settings

_TAIL_BYTES = 4096
_START_TIMEOUT_S = 300
_PREPARE_TIMEOUT_S = 1800

Tell = Callable[[str, Mapping[str, Any]], None]


class Nursery:
    """The fork server's other end: starts workers, kills them, hears how they ended."""

    def __init__(self, preload: list[str], threads: int) -> None:
        self._socket, child = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "membench.forkserver", *preload],
            stdin=child.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment.worker_environment(threads),
            start_new_session=True,  # a Ctrl-C in the terminal is for the runner alone
        )
        child.close()
        self._buffer = b""
        self.ready: Mapping[str, Any] | None = None

    def wait_until_ready(self) -> None:
        if self.ready is None:
            self.ready = self.answer(_START_TIMEOUT_S)

    def fileno(self) -> int:
        return self._socket.fileno()

    def answer(self, timeout_s: float) -> Mapping[str, Any]:
        """The next message of the fork server."""
        self._socket.settimeout(timeout_s)
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise MembenchError(f"the fork server did not answer within {timeout_s:g} s") from None
            if not data:
                raise MembenchError("the fork server ended unexpectedly")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: Mapping[str, Any] = json.loads(line)
        return answer

    def start(self, request: Mapping[str, Any], pipe: socket.socket, output: int) -> int:
        """Start a worker; its process id."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], [pipe.fileno(), output])
        return int(self.answer(60)["pid"])

    def kill(self) -> None:
        """Kill the worker and its descendants."""
        self._socket.sendall(b'{"kill": true}')

    def close(self) -> None:
        self._socket.close()  # its end tells the fork server to kill what runs and to go
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Runner:
    """Runs cases with one fork server. Use as a context manager."""

    def __init__(self, cases: tuple[Case, ...], settings: Settings, tell: Tell) -> None:
        self.settings = settings
        self.threads = settings.threads or environment.usable_cores()
        self._tell = tell
        preload = {"membench.worker", "safetensors.torch"}
        for case in cases:
            for kind, plugin in _plugins_of(case):
                preload |= set(plugins.find(kind, plugin.use)[0].imports)
        self._preload = sorted(preload) if settings.isolation == "fork" else []
        self._nursery: Nursery | None = None
        self._gpu: Gpu | None = None
        if any(case.device.startswith("cuda") for case in cases):
            self._gpu, _ = gpu_observer()
        self.machine = environment.describe(self.threads)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._nursery:
            self._nursery.close()

    def _home(self) -> Nursery:
        if self._nursery is None:
            self._nursery = Nursery(self._preload, self.threads)
        self._nursery.wait_until_ready()
        return self._nursery

    def prepare(self, case: Case) -> str | None:
        """Let a case's model do what it does once; the message if that failed."""
        request = {"prepare": True, "device": "cpu", "isolation": self.settings.isolation,
                   "model": {"use": case.model_plugin.use, "options": dict(case.model_plugin.options)}}  # fmt: skip
        outcome = self._watch(request, _PREPARE_TIMEOUT_S)
        return None if outcome["status"] == "ok" else str(outcome["message"])

    def run_case(self, case: Case, repeat: int, limits: Mapping[str, float]) -> Record:
        """Measure one case; always a record, whatever becomes of the worker."""
        began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        request = {
            "device": case.device,
            "isolation": self.settings.isolation,
            "threads": self.threads,
            "settings": self.settings.model_dump(),
            "model": {"use": case.model_plugin.use, "options": dict(case.model_plugin.options)},
            "techniques": [{"use": t.use, "options": dict(t.options)} for t in case.technique_plugins],
            "members": case.technique.split("+"),
            "workload": {"use": case.workload_plugin.use, "options": dict(case.workload_plugin.options)},
        }
        outcome = self._watch(request, self.settings.timeout_s)
        metrics, reasons, sources = _metrics(outcome, case.device.startswith("cuda"))
        broken = tuple(
            f"{field} = {value:g} is over its limit of {limits[field]:g}"
            for field, value in metrics.items()
            if field in limits and value is not None and _breaks(field, value, limits[field])
        )
        result = outcome["result"]
        return Record(
            case={
                "model": case.model, "technique": case.technique, "workload": case.workload, "device": case.device,
                **{key: request[key] for key in ("model", "techniques", "workload") if key == "techniques"},
                "model_plugin": request["model"], "workload_plugin": request["workload"],
            },
            id=case.id,
            repeat=repeat,
            status=outcome["status"],
            ended_in=outcome["phase"],
            message=outcome["message"],
            started_at=started_at,
            duration_s=round(time.monotonic() - began, 4),
            metrics=metrics,
            reasons=reasons,
            sources=sources,
            processes=(
                {
                    "role": "worker", "rank": 0, "device": case.device, "pid": outcome["pid"],
                    "baseline": outcome["baseline"], "phases": outcome["phases"],
                    "durations_s": result.get("durations_s"), "parameters": result.get("parameters"),
                    "disk_format": result.get("disk_format"),
                    "children_peak_unique_bytes": outcome["observer"].children_peak_bytes,
                },
            ),
            remarks=tuple(result.get("remarks", ())),
            broken_limits=broken,
            timeline=outcome["observer"].timeline(),
            output_tail=outcome["tail"].decode(errors="replace") if outcome["status"] not in ("ok", "skipped") else "",
            machine=self.machine,
            settings=self.settings.model_dump(),
        )  # fmt: skip

    def _watch(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Start a worker and follow it to its end."""
        home = self._home()
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        oom_before = procfs.oom_kills()
        with ours:
            pid = home.start(request, theirs, write_end)
            theirs.close()
            os.close(write_end)
            try:
                return self._follow(home, pid, ours, read_end, time.monotonic() + timeout_s, timeout_s, oom_before)
            except BaseException:
                home.kill()
                raise
            finally:
                os.close(read_end)

    def _follow(
        self, home: Nursery, pid: int, pipe: socket.socket, output: int, deadline: float, timeout_s: float,
        oom_before: int | None,
    ) -> dict[str, Any]:  # fmt: skip
        observer = Observer(pid, self._gpu)
        seen: dict[str, Any] = {"pid": pid, "phases": [], "phase": None, "result": {}, "status": None, "message": None,
                                "baseline": None, "tail": b"", "observer": observer}  # fmt: skip
        buffer, done, timed_out, exited = b"", False, False, None
        sources = [home.fileno(), pipe.fileno(), output]
        while exited is None or pipe.fileno() in sources:
            ready, _, _ = select.select(sources, [], [], self.settings.sampling_interval_s)
            if output in ready:
                data = os.read(output, 65536)
                seen["tail"] = (seen["tail"] + data)[-_TAIL_BYTES:]
                if not data:
                    sources.remove(output)
            if pipe.fileno() in ready:
                try:
                    data = pipe.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    sources.remove(pipe.fileno())
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    done = done or message["event"] == "done"
                    self._hear(message, seen, observer, pipe)
            if exited is None and home.fileno() in ready:
                exited = int(home.answer(5)["exited"])
                sources.remove(home.fileno())
            if exited is None:
                self._tell("memory", {"bytes": observer.look()})
            if not timed_out and exited is None and time.monotonic() > deadline:
                timed_out = True
                home.kill()
        self._judge(seen, done, timed_out, timeout_s, exited, oom_before)
        return seen

    def _hear(self, message: Mapping[str, Any], seen: dict[str, Any], observer: Observer, pipe: socket.socket) -> None:
        match message["event"]:
            case "begin":
                seen["phase"] = message["phase"]
                self._tell("phase", {"phase": message["phase"]})
            case "end":
                seen["phases"].append(message["phase"])
            case "baseline" | "result" as kind:
                seen[kind] = (
                    message["result"] if kind == "result" else {k: v for k, v in message.items() if k != "event"}
                )
            case "status":
                seen["status"], seen["message"] = message["status"], message["message"]
            case "progress":
                self._tell("progress", message)
        if message["event"] in ("begin", "end"):
            observer.look()
            with contextlib.suppress(OSError):
                pipe.sendall(b"go\n")

    @staticmethod
    def _judge(
        seen: dict[str, Any], done: bool, timed_out: bool, timeout_s: float, exited: int, oom_before: int | None
    ) -> None:
        status: Status
        if seen["status"] is not None:
            return
        if done:
            seen["status"], seen["phase"] = "ok", None
            return
        if timed_out:
            status, message = "timeout", f"not done after {timeout_s:g} s"
        elif os.WIFSIGNALED(exited):
            number = os.WTERMSIG(exited)
            status, message = "crashed", f"killed by {signal.Signals(number).name}"
            oom_now = procfs.oom_kills()
            if number == signal.SIGKILL and oom_before is not None and oom_now is not None and oom_now > oom_before:
                status, message = "out-of-memory", "killed by the kernel for want of memory"
        else:
            status, message = "crashed", f"ended with exit code {os.WEXITSTATUS(exited)} before it was done"
        seen["status"], seen["message"] = status, message


def _plugins_of(case: Case) -> list[tuple[str, Plugin]]:
    techniques = [("technique", plugin) for plugin in case.technique_plugins]
    return [("model", case.model_plugin), *techniques, ("workload", case.workload_plugin)]


def _breaks(field: str, value: float, limit: float) -> bool:
    better = next(metric.better for metric in METRICS if metric.field == field)
    return value > limit if better == "lower" else value < limit


def _metrics(
    outcome: Mapping[str, Any], cuda: bool
) -> tuple[dict[str, float | int | None], dict[str, str], dict[str, str]]:
    """A case's figures out of its phases; the reason of each that is missing; the source of the others."""
    phases = {phase["name"]: phase for phase in outcome["phases"]}
    result = outcome["result"]

    def of(phase: str, key: str) -> Any:
        return phases.get(phase, {}).get(key)

    live = "cuda_peak_allocated_bytes" if cuda else "peak_live_bytes"
    held = "cuda_held_allocated_bytes" if cuda else "held_live_bytes"
    gpu = [bytes for bytes in outcome["observer"].timeline()["gpu_process_bytes"] if bytes is not None]
    median = result.get("step_median_s")
    values: dict[str, float | int | None] = {
        "weights_bytes": result.get("weights_bytes"),
        "peak_live_bytes": of("run", live),
        "held_live_bytes": of("run", held),
        "peak_footprint_bytes": (max(gpu) if gpu else None) if cuda else of("time", "peak_footprint_bytes"),
        "disk_bytes": result.get("disk_bytes"),
        "step_median_s": median,
        "step_p95_s": _p95(result.get("durations_s")),
        "tokens_per_s": result["tokens_per_step"] / median if median else None,
        "load_peak_live_bytes": of("load", live),
        "apply_peak_live_bytes": of("apply", live),
        "bits_per_byte": result.get("bits_per_byte"),
    }
    for part, field in (("prefill", "time_to_first_token_s"), ("forward", "forward_s"), ("backward", "backward_s"),
                        ("optimizer", "optimizer_s")):  # fmt: skip
        durations = (of("time", "parts") or {}).get(part, {}).get("durations_s")
        if durations:
            values[field] = statistics.median(durations)
    if result and not cuda and not result["pinned"]:
        for field in ("peak_live_bytes", "held_live_bytes", "load_peak_live_bytes", "apply_peak_live_bytes"):
            values[field] = None
    reasons = {}
    for field, value in values.items():
        if value is None:
            if outcome["status"] != "ok":
                reasons[field] = f"the case ended as {outcome['status']}"
            elif field == "bits_per_byte":
                reasons[field] = "random weights or not byte-level: it would mean nothing"
            elif field == "disk_bytes":
                reasons[field] = str(result.get("disk_format"))
            else:
                reasons[field] = (
                    "not available: the C library's malloc cannot be pinned" if not cuda else "NVML hides it"
                )
    kernel = "kernel peak of resident memory (VmHWM, reset at the phase's start), worker alone"
    sources = {
        "peak_live_bytes": "torch allocator" if cuda else f"{kernel}, less file pages, pinned malloc",
        "peak_footprint_bytes": "NVML per process, sampled: a lower bound" if cuda else f"{kernel}, default malloc",
        "held_live_bytes": "torch allocator" if cuda else "RssAnon after garbage collection and malloc_trim",
        "weights_bytes": "walk over parameters and buffers, each storage once",
        "step_median_s": "steps under default malloc, after a synchronize on a GPU",
    }
    return values, reasons, sources


def _p95(durations: list[float] | None) -> float | None:
    if not durations or len(durations) < 2:
        return None
    return statistics.quantiles(durations, n=20, method="inclusive")[-1]
