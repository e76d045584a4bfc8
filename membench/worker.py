"""Inside the measured process: a case's phases, one after the other, each told to the runner as it begins and ends.

Live memory is measured in ``warmup`` and ``run`` under the pinned allocator; ``time`` runs other steps under the
default one, for durations and for the footprint that a user's process would show.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from membench import allocator, corpus, plugins, procfs
from membench.environment import available_bytes
from membench.units import format_bytes
from membench.weights import fingerprint, weight_bytes


class DoesNotFit(Exception):
    """Arithmetic says that the model needs more memory than there is."""


class Refused(Exception):
    """A case that cannot be run here, with the reason."""


class Meter:
    """Measures phases and the parts of a step, and tells the runner."""

    def __init__(self, channel: socket.socket, device: str) -> None:
        self.channel = channel
        self.cuda = device.startswith("cuda")
        self.device = device
        self.baseline = procfs.resident()
        self.memory_in_parts = False
        self.parts: dict[str, dict[str, Any]] = {}
        self._answers = channel.makefile("rb")

    def tell(self, **message: Any) -> None:
        self.channel.sendall(json.dumps(message).encode() + b"\n")

    def set_baseline(self) -> None:
        allocator.settle()
        self.baseline = procfs.resident()
        self.tell(event="baseline", anonymous_bytes=self.baseline.anonymous_bytes, file_bytes=self.baseline.file_bytes)

    @contextlib.contextmanager
    def phase(self, name: str, allocator_name: str) -> Iterator[dict[str, Any]]:
        """Measure a phase; the runner acknowledges both ends, so that its own readings fall on the boundary."""
        allocator.settle()
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.tell(event="begin", phase=name)
        self._answers.readline()
        start = procfs.resident()
        procfs.reset_peak()
        began = time.perf_counter()
        measured: dict[str, Any] = {"name": name, "allocator": allocator_name}
        yield measured
        if self.cuda:
            torch.cuda.synchronize(self.device)
        measured["duration_s"] = time.perf_counter() - began
        end = procfs.resident()
        peak = max(
            [end.peak_bytes, *(part["peak_rss_bytes"] for part in self.parts.values() if "peak_rss_bytes" in part)]
        )
        measured |= self._peaks(start, end, peak)
        if self.cuda:
            measured["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
            measured["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        allocator.settle()
        settled = procfs.resident()
        measured["held_live_bytes"] = settled.anonymous_bytes - self.baseline.anonymous_bytes
        measured["held_footprint_bytes"] = settled.total_bytes - self.baseline.total_bytes
        if self.cuda:
            measured["cuda_held_allocated_bytes"] = torch.cuda.memory_allocated(self.device)
        measured["parts"] = self.parts
        self.parts = {}
        self.tell(event="end", phase=measured)
        self._answers.readline()

    def _peaks(self, start: procfs.Resident, end: procfs.Resident, peak_rss_bytes: int) -> dict[str, int]:
        """The kernel knows the peak of all pages; less the file pages at the two ends brackets the live part."""
        base = self.baseline
        fewest, most = sorted((start.file_bytes, end.file_bytes))
        lowest = max(peak_rss_bytes - most, start.anonymous_bytes, end.anonymous_bytes)
        return {
            "peak_live_bytes": max(peak_rss_bytes - fewest, lowest) - base.anonymous_bytes,
            "peak_live_at_least_bytes": lowest - base.anonymous_bytes,
            "peak_footprint_bytes": peak_rss_bytes - base.total_bytes,
            "file_start_bytes": start.file_bytes - base.file_bytes,
            "file_end_bytes": end.file_bytes - base.file_bytes,
        }

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Mark a part of a step: its memory in ``run``, its duration in ``time``."""
        entry = self.parts.setdefault(name, {"durations_s": []})
        if self.memory_in_parts:
            # The peak since the last boundary belongs to what ran before this part.
            outside = procfs.resident().peak_bytes
            other = self.parts.setdefault("other", {"durations_s": []})
            other["peak_rss_bytes"] = max(outside, other.get("peak_rss_bytes", 0))
            start = procfs.resident()
            procfs.reset_peak()
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize(self.device)
        entry["durations_s"].append(time.perf_counter() - began)
        if self.memory_in_parts:
            end = procfs.resident()
            if end.peak_bytes >= entry.get("peak_rss_bytes", 0):
                entry |= self._peaks(start, end, end.peak_bytes) | {"peak_rss_bytes": end.peak_bytes}
            entry["held_live_bytes"] = end.anonymous_bytes - self.baseline.anonymous_bytes
            procfs.reset_peak()


def main(request: dict[str, Any], channel: socket.socket) -> None:
    """Measure the case in ``request`` and tell the runner over ``channel``; every end is told, none is raised."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this process that goes
    meter = Meter(channel, request["device"])
    try:
        if request.get("prepare"):
            _prepare(request, meter)
        else:
            _measure(request, meter)
        meter.tell(event="done")
    except Refused as error:
        meter.tell(event="status", status="skipped", message=str(error))
    except DoesNotFit as error:
        meter.tell(event="status", status="out-of-memory", message=str(error))
    except Exception as error:
        status = "out-of-memory" if _is_out_of_memory(error) else "failed"
        meter.tell(event="status", status=status, message=f"{type(error).__name__}: {error}".partition("\n")[0][:500])
        raise


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    kinds = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in kinds or "can't allocate memory" in text or "cannot allocate memory" in text


def _prepare(request: dict[str, Any], meter: Meter) -> None:
    model = plugins.create("model", request["model"]["use"], request["model"]["options"])
    model.prepare(lambda done, total, what: meter.tell(event="progress", done=done, total=total, what=what))


def _prime(device: str, threads: int) -> None:
    """Wake what every case needs (thread pool, kernels, the CUDA context), so that no case is charged for it."""
    import torch

    torch.set_num_threads(threads)
    layer = torch.nn.Linear(256, 256, device=device)
    torch.nn.functional.gelu(layer(torch.ones(64, 256, device=device))).softmax(-1).sum().backward()


def _measure(request: dict[str, Any], meter: Meter) -> None:
    device, settings = request["device"], request["settings"]
    model = plugins.create("model", request["model"]["use"], request["model"]["options"])
    techniques = [plugins.create("technique", t["use"], t["options"]) for t in request["techniques"]]
    workload = plugins.create("workload", request["workload"]["use"], request["workload"]["options"])
    for technique in techniques:
        reason = technique.refuse(request["workload"]["use"], device)
        if reason:
            raise Refused(reason)
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Refused("no CUDA device here, or a torch build without CUDA")
    pinned = allocator.pin()
    torch.manual_seed(settings["seed"])
    _prime(device, request["threads"])
    context = plugins.Context(device=device, seed=settings["seed"], model=model, part=meter.part)
    _refuse_what_cannot_fit(model, context)
    corpus.read()  # the text is the harness's, not the case's
    meter.set_baseline()
    result: dict[str, Any] = {"pinned": pinned, "remarks": []}
    torch.manual_seed(settings["seed"])
    with meter.phase("load", "pinned"):
        build: Callable[[], torch.nn.Module] = lambda: model.build(context)  # noqa: E731
        for technique in techniques:
            build = _loading(technique, build, context)
        module = build()
    with meter.phase("apply", "pinned"):
        for name, technique in zip(request["members"], techniques, strict=True):
            before = fingerprint(module)
            module = technique.apply(module, context)
            if type(technique).apply is not plugins.Technique.apply and fingerprint(module) == before:
                result["remarks"].append(f"'{name}' changed nothing in the model")
    result["weights_bytes"] = weight_bytes(module)
    result["parameters"] = sum(parameter.numel() for parameter in module.parameters())

    module.train(workload.trains)
    tokens = torch.tensor(corpus.tokens(model.vocabulary(module), workload.tokens_per_step() * 4), dtype=torch.long)
    with contextlib.ExitStack() as stack:
        for technique in techniques:
            stack.enter_context(technique.step_context(context))
        with meter.phase("warmup", "pinned"):
            step = workload.start(module, tokens, techniques, context)
            step()
        with meter.phase("run", "pinned"):
            meter.memory_in_parts = True
            step()
            meter.memory_in_parts = False
        allocator.unpin()
        with meter.phase("time", "default"):
            for _ in range(settings["warmup_steps"]):
                step()
            meter.parts.clear()
            durations = []
            for _ in range(settings["measured_steps"]):
                began = time.perf_counter()
                step()
                if meter.cuda:
                    torch.cuda.synchronize(device)
                durations.append(time.perf_counter() - began)
    allocator.pin()
    result |= {"durations_s": durations, "tokens_per_step": workload.tokens_per_step()}
    if model.quality:
        with meter.phase("evaluate", "pinned"):
            result["bits_per_byte"] = corpus.bits_per_byte(module.eval(), device)
    with meter.phase("save", "pinned"):
        result["disk_bytes"], result["disk_format"] = _save(module, Path(request["scratch"]))
    result["step_median_s"] = statistics.median(durations)
    meter.tell(event="result", result=result)


def _loading(technique: plugins.Technique, build: Callable[[], Any], context: plugins.Context) -> Callable[[], Any]:
    return lambda: technique.load(build, context)


def _refuse_what_cannot_fit(model: plugins.Model, context: plugins.Context) -> None:
    """Compare what the shapes need with what is free, before anything is loaded."""
    import torch

    needed = model.needed_bytes()
    if needed is None:
        return
    if context.device.startswith("cuda"):
        free, where = torch.cuda.mem_get_info(context.device)[0], "free on the GPU"
    else:
        free, where = available_bytes(), "available on this machine"
    if needed > free:
        raise DoesNotFit(f"loading needs {format_bytes(needed)}; {format_bytes(free)} are {where}")


def _save(module: Any, folder: Path) -> tuple[int | None, str]:
    """The checkpoint's size on disk: safetensors where every tensor is plain, else torch.save of the state dict."""
    import shutil

    import safetensors.torch
    import torch

    if weight_bytes(module) * 1.1 > shutil.disk_usage(folder).free:
        return None, "not enough room on the disk"
    path = folder / "checkpoint"
    if any(hasattr(tensor.data, "__tensor_flatten__") for tensor in module.parameters()):
        torch.save(module.state_dict(), path)
        form = "torch.save"
    else:
        safetensors.torch.save_model(module, str(path))
        form = "safetensors"
    size = path.stat().st_size
    path.unlink()
    return size, form


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    main(arguments, socket.socket(fileno=int(sys.argv[2])))
    os._exit(0)
