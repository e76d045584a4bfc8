"""Inside the measured process: a case's phases, one after the other.

Live memory is measured in ``warmup``, ``run`` and ``breakdown`` under the pinned allocator; ``time`` runs other steps
under the default one, for durations and for the footprint that a user's process would show.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from membench import allocator, census, checkpoint, corpus, notes, plugins, quality, registry
from membench.assembly import Assembly, DoesNotFit
from membench.meter import Meter
from membench.weights import fingerprint, weight_bytes

# The kernel counts pages per core and may read some 0.1 MiB low; the highest of three steps comes close to the truth.
_STEPS_FOR_MEMORY = 3


class Diverged(Exception):
    """A training whose loss is no number any more; all that was measured stands."""


def main(request: dict[str, Any], channel: socket.socket) -> None:
    """Do what ``request`` asks and tell the runner over ``channel`` how it ended."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this process that goes
    meter = Meter(channel, request["device"])
    try:
        if request.get("prepare"):
            _prepare(request, meter)
        else:
            _measure(request, meter)
        meter.tell(event="done")
    except plugins.Unsuitable as error:
        meter.tell(event="status", status="skipped", message=str(error))
    except DoesNotFit as error:
        meter.tell(event="status", status="out-of-memory", message=str(error))
    except Diverged as error:
        meter.tell(event="status", status="diverged", message=str(error))
    except Exception as error:
        status = "out-of-memory" if _is_out_of_memory(error) else "failed"
        meter.tell(event="status", status=status, message=f"{type(error).__name__}: {error}".partition("\n")[0][:500])
        raise


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    kinds = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in kinds or "can't allocate memory" in text or "cannot allocate memory" in text


def _prepare(request: dict[str, Any], meter: Meter) -> None:
    model = registry.create("model", request["model"]["use"], request["model"]["options"])
    model.prepare(lambda done, total, what: meter.tell(event="progress", done=done, total=total, what=what))


def _measure(request: dict[str, Any], meter: Meter) -> None:
    device, settings = request["device"], request["settings"]
    case = Assembly.of(request, meter.part)
    import torch

    if meter.on_gpu:
        _refuse_missing_gpu(device)
    case.read_text()
    case.prepare()
    pinned = allocator.pin()
    torch.set_num_threads(request["threads"])
    case.refuse_what_cannot_fit()
    case.rehearse()
    if meter.on_gpu:
        _announce_gpu(meter, device)
    loads_converted = any(technique.applies_rest for technique in case.techniques)
    plain_bytes = case.plain_weight_bytes() if loads_converted else None
    meter.set_baseline()

    result: dict[str, Any] = {"pinned": pinned, "remarks": [], "corpus": corpus.digest(),
                              "is_trained": case.model.quality}  # fmt: skip
    torch.manual_seed(settings["seed"])
    with meter.phase("load", "pinned"):
        meter.memory_in_parts = True
        module = case.load()
        meter.memory_in_parts = False
    if not loads_converted:
        plain_bytes = weight_bytes(module)
    with meter.phase("apply", "pinned"):
        for name, technique in case.applied:
            before = fingerprint(module)
            module = technique.apply(module, case.context)
            if type(technique).apply is not plugins.Technique.apply and fingerprint(module) == before:
                result["remarks"].append(f"'{name}' changed nothing in the model")
    result["weights_bytes"] = weight_bytes(module)
    result["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    result["notes"] = notes.on_weights(module, case.techniques, plain_bytes)
    module.train(case.workload.trains)

    losses: list[float] = []

    def hear(loss: torch.Tensor | None) -> None:
        if loss is not None:
            losses.append(loss.item())

    with meter.phase("warmup", "pinned"):
        step = case.workload.start(module, case.tokens(module), case.techniques, case.context)
        hear(step())
    if case.workload.trains:
        result |= _trained_and_frozen(module)
    with meter.phase("run", "pinned") as run:
        meter.memory_in_parts = True
        for _ in range(_STEPS_FOR_MEMORY):
            hear(step())
        meter.memory_in_parts = False
    if case.context.inventory:
        with meter.phase("breakdown", "pinned"):
            watch = census.Census(module, case.context.inventory, meter.held_live_bytes, lambda: meter.current_part)
            with watch.watching(), meter.looking(watch.look):
                hear(step())
        peaks = _peaks_of_parts(run, meter.on_gpu, pinned)
        result["breakdown_bytes"] = watch.breakdown(peaks)
        result["peak_part"] = max(peaks, key=lambda part: peaks[part], default=None)
    for name, technique in zip(case.names, case.techniques, strict=True):
        if remark := technique.remark(module, case.context):
            result["remarks"].append(f"'{name}' {remark}")
    allocator.unpin()
    with meter.phase("time", "default") as timed:
        timed["steps"] = settings["warmup_steps"] + settings["measured_steps"]
        for _ in range(settings["warmup_steps"]):
            hear(step())
        meter.parts.clear()
        result["durations_s"] = []
        for _ in range(settings["measured_steps"]):
            meter.synchronize()
            began = time.perf_counter()
            loss = step()
            meter.synchronize()
            result["durations_s"].append(time.perf_counter() - began)
            hear(loss)
    allocator.pin()
    del step
    case.context.inventory.clear()
    result["losses_nats"] = [loss if math.isfinite(loss) else None for loss in losses]
    if case.model.gives_logits:
        with meter.phase("evaluate", "pinned"):
            module.eval()
            reference = Path(request["reference"]["path"])
            result["quality"] = quality.evaluate(
                case.model,
                module,
                case.techniques,
                case.workload,
                case.context,
                reference,
                request["reference"]["is_this"],
            )
    result["tokens_per_step"] = case.workload.tokens_per_step()
    result["decoded_tokens"] = case.workload.decoded_tokens_per_step()
    # Told before the checkpoint is written, so that a full disk costs no other figure.
    meter.tell(event="result", result={**result, "disk_bytes": None, "disk_format": "the checkpoint was not saved"})
    with meter.phase("save", "pinned"):
        result["disk_bytes"], result["disk_format"] = checkpoint.save(module, Path(request["scratch"]))
    meter.tell(event="result", result=result)
    wrong = [(number, loss) for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    if wrong:
        raise Diverged(f"the training loss became {wrong[0][1]} in step {wrong[0][0]}")


def _peaks_of_parts(run: dict[str, Any], on_gpu: bool, pinned: bool) -> dict[str, int]:
    """The live peak of each part of a step, where it is known."""
    if not (on_gpu or pinned):
        return {}
    key = "cuda_peak_allocated_bytes" if on_gpu else "peak_live_bytes"
    return {name: part[key] for name, part in run["parts"].items() if name != "between" and key in part}


def _trained_and_frozen(module: Any) -> dict[str, int]:
    """Bytes of parameters that the optimizer trains, and of those that it leaves alone."""
    trained = census.storages(p for p in module.parameters() if p.requires_grad)
    frozen = census.storages(p for p in module.parameters() if not p.requires_grad)
    return {"trained_weights_bytes": sum(trained.values()), "frozen_weights_bytes": sum(frozen.values())}


def _refuse_missing_gpu(device: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise plugins.Unsuitable("no CUDA device here, or a torch build without CUDA")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise plugins.Unsuitable(f"there is no {device} here: the last is cuda:{last}")


def _announce_gpu(meter: Meter, device: str) -> None:
    """Tell the runner which device it is, so that it can find it in NVML, where devices have another order."""
    import torch

    # cuBLAS keeps workspaces of the rehearsal in torch's allocator; a case that needs them takes them anew.
    torch._C._cuda_clearCublasWorkspaces()
    properties = torch.cuda.get_device_properties(device)
    meter.tell(
        event="device",
        uuid=str(properties.uuid),
        name=properties.name,
        capability=[properties.major, properties.minor],
        memory_bytes=properties.total_memory,
        cuda=torch.version.cuda,
    )


if __name__ == "__main__":
    main(json.load(sys.stdin), socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
