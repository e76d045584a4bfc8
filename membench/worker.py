"""Inside the measured process: a case's phases, one after the other.

Live memory is measured in ``warmup`` and ``run`` under the pinned allocator; ``time`` runs other steps under the
default one, for durations and for the footprint that a user's process would show.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from membench import allocator, checkpoint, corpus, plugins
from membench.environment import available_bytes
from membench.meter import Meter
from membench.units import format_bytes
from membench.weights import fingerprint, weight_bytes

# The kernel counts pages per core and may read some 0.1 MiB low; the highest of three steps comes close to the truth.
_STEPS_FOR_MEMORY = 3


class DoesNotFit(Exception):
    """Arithmetic says that the model needs more memory than there is."""


class Refused(Exception):
    """A case that cannot be run here, with the reason."""


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


def _measure(request: dict[str, Any], meter: Meter) -> None:
    device, settings = request["device"], request["settings"]
    model: plugins.Model = plugins.create("model", request["model"]["use"], request["model"]["options"])
    techniques: list[plugins.Technique] = [
        plugins.create("technique", technique["use"], technique["options"]) for technique in request["techniques"]
    ]
    workload: plugins.Workload = plugins.create("workload", request["workload"]["use"], request["workload"]["options"])
    for technique in techniques:
        reason = technique.refuse(request["workload"]["use"], device)
        if reason:
            raise Refused(reason)
    import torch

    if meter.on_gpu and not torch.cuda.is_available():
        raise Refused("no CUDA device here, or a torch build without CUDA")
    pinned = allocator.pin()
    torch.set_num_threads(request["threads"])
    context = plugins.Context(device=device, seed=settings["seed"], model=model, part=meter.part)
    _refuse_what_cannot_fit(model, techniques, context)
    corpus.read()  # the text is the harness's, not the case's
    _rehearse(model, techniques, workload, context)
    if meter.on_gpu:
        _announce_gpu(meter, device)
    meter.set_baseline()

    result: dict[str, Any] = {"pinned": pinned, "remarks": [], "corpus": corpus.digest()}
    torch.manual_seed(settings["seed"])
    with meter.phase("load", "pinned"):
        module = _load(model, techniques, context)
    with meter.phase("apply", "pinned"):
        for name, technique in zip(request["members"], techniques, strict=True):
            before = fingerprint(module)
            module = technique.apply(module, context)
            if type(technique).apply is not plugins.Technique.apply and fingerprint(module) == before:
                result["remarks"].append(f"'{name}' changed nothing in the model")
    result["weights_bytes"] = weight_bytes(module)
    result["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    module.train(workload.trains)

    with contextlib.ExitStack() as stack:
        for technique in techniques:
            stack.enter_context(technique.step_context(context))
        with meter.phase("warmup", "pinned"):
            step = workload.start(module, _tokens(model, module, workload), techniques, context)
            step()
        with meter.phase("run", "pinned"):
            meter.memory_in_parts = True
            for _ in range(_STEPS_FOR_MEMORY):
                step()
            meter.memory_in_parts = False
        allocator.unpin()
        with meter.phase("time", "default") as timed:
            timed["steps"] = settings["warmup_steps"] + settings["measured_steps"]
            for _ in range(settings["warmup_steps"]):
                step()
            meter.parts.clear()
            result["durations_s"] = []
            for _ in range(settings["measured_steps"]):
                meter.synchronize()
                began = time.perf_counter()
                loss = step()
                meter.synchronize()
                result["durations_s"].append(time.perf_counter() - began)
        allocator.pin()
        del step
        if model.quality and not workload.trains:
            with meter.phase("evaluate", "pinned"):
                bits = corpus.bits_per_byte(module.eval(), device)
            result["bits_per_byte"] = bits if math.isfinite(bits) else None
            if result["bits_per_byte"] is None:
                result["remarks"].append(f"held-out bits per byte are {bits}")
    if loss is not None:
        result["final_loss_nats"] = loss.item() if math.isfinite(loss.item()) else None
        if result["final_loss_nats"] is None:
            result["remarks"].append(f"the training loss became {loss.item()}")
    result["tokens_per_step"] = workload.tokens_per_step()
    result["decoded_tokens"] = workload.decoded_tokens_per_step()
    # Told before the checkpoint is written, so that a full disk costs no other figure.
    meter.tell(event="result", result={**result, "disk_bytes": None, "disk_format": "the checkpoint was not saved"})
    with meter.phase("save", "pinned"):
        result["disk_bytes"], result["disk_format"] = checkpoint.save(module, Path(request["scratch"]))
    meter.tell(event="result", result=result)


def _load(model: plugins.Model, techniques: list[plugins.Technique], context: plugins.Context) -> Any:
    build: Callable[[], Any] = lambda: model.build(context)  # noqa: E731
    for technique in techniques:
        build = _loading(technique, build, context)
    return build()


def _loading(technique: plugins.Technique, build: Callable[[], Any], context: plugins.Context) -> Callable[[], Any]:
    return lambda: technique.load(build, context)


def _tokens(model: plugins.Model, module: Any, workload: plugins.Workload) -> Any:
    import torch

    return torch.tensor(corpus.tokens(model.vocabulary(module), workload.tokens_read()), dtype=torch.long)


def _rehearse(
    model: plugins.Model, techniques: list[plugins.Technique], workload: plugins.Workload, context: plugins.Context
) -> None:
    """Go through the case on a miniature of its model, so that what is set up once is there before the baseline.

    Thread pool, CUDA context, kernels' code pages, lazily imported modules: some 10 MiB that the first step of
    whatever comes first would be charged for.
    """
    import torch

    layer = torch.nn.Linear(256, 256, device=context.device)
    torch.nn.functional.gelu(layer(torch.ones(64, 256, device=context.device))).softmax(-1).sum().backward()
    miniature = model.miniature()
    if miniature is None:
        return
    silent = plugins.Context(context.device, context.seed, miniature, lambda _: contextlib.nullcontext())
    # What fails here fails again where it is measured, or fails for the small shape alone.
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        module = _load(miniature, techniques, silent)
        for technique in techniques:
            module = technique.apply(module, silent)
        module.train(workload.trains)
        for technique in techniques:
            stack.enter_context(technique.step_context(silent))
        step = workload.start(module, _tokens(miniature, module, workload), techniques, silent)
        step()


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


def _refuse_what_cannot_fit(
    model: plugins.Model, techniques: list[plugins.Technique], context: plugins.Context
) -> None:
    """Compare what the shapes need with what is free, before anything is loaded."""
    import torch

    if any(type(technique).load is not plugins.Technique.load for technique in techniques):
        return  # loaded in a way of its own, a model may need less than it has weights
    needed = model.needed_bytes()
    if needed is None:
        return
    if context.device.startswith("cuda"):
        free, where = torch.cuda.mem_get_info(context.device)[0], "free on the GPU"
    else:
        free, where = available_bytes(), "available on this machine"
    if needed > free:
        raise DoesNotFit(f"loading needs {format_bytes(needed)}; {format_bytes(free)} are {where}")


if __name__ == "__main__":
    main(json.load(sys.stdin), socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
