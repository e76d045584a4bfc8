"""The times of membench and of a plain loop, in turn; for a machine that does nothing else. Speed is no test.

python -m tests.plain_loop [--rounds 5] [-k generate]

Each round measures every case with membench and in a plain process. A row has the medians over the rounds and their
ratio, which should be within 5% of 1. Rounds in which other processes used the cores (``~``) do not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import membench
from membench.host import environment
from membench.host.device import Device
from membench.protocol import pickling
from membench.records.disturbed_times import is_disturbed
from membench.records.record import Record
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.function import PRELOADED, FunctionJob
from membench.running.needs import Needs
from membench.running.session import silent
from membench.suite.schema import Settings

_WARMUP, _MEASURED = 10, 30

_SUITE = """\
[suite]
name = "plain-loop"
[matrix]
model = ["untrained-tiny"]
technique = [{technique}]
workload = ["{workload}"]
[settings]
threads = {threads}
warmup_steps = {warmup}
measured_steps = {measured}
"""

# The model of untrained-tiny with what the workloads do by default, as one would write it by hand.
_PLAIN = """
import json, statistics, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM

workload, kind, threads, warmup, measured = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=1024)
).train(workload == "train")
if kind == "bf16":
    model = model.to(torch.bfloat16)


def forward():
    with torch.no_grad():
        model(torch.randint(0, 256, (1, 256)))


def generate():
    with torch.no_grad():
        output = model(torch.randint(0, 256, (1, 128)), use_cache=True)
        for _ in range(31):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)


def train():
    optimizer.zero_grad()
    batch = torch.randint(0, 256, (2, 128))
    logits = model(batch).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    optimizer.step()


step, durations_s = {"forward": forward, "generate": generate, "train": train}[workload], []
for _ in range(warmup + measured):
    began = time.perf_counter()
    step()
    durations_s.append(time.perf_counter() - began)
print(json.dumps(statistics.median(durations_s[warmup:])))
"""


def _with_membench(workload: str, technique: str, threads: int, folder: Path) -> float | None:
    """Return the median duration of a step in seconds; ``None`` if other processes disturbed it."""
    suite = folder / "plain-loop.toml"
    suite.write_text(
        _SUITE.format(
            workload=workload, technique=json.dumps(technique), threads=threads, warmup=_WARMUP, measured=_MEASURED
        )
    )
    loaded = membench.load_suite(suite)
    run = membench.run(loaded, keep=lambda case_id: f"/{technique}/" in case_id, output=folder)
    return _calm_time(run.records[-1])


_PRODUCT = """
import numpy

square = numpy.ones((1024, 1024))


def product():
    return square @ square
"""

_PLAIN_PRODUCT = f"""{_PRODUCT}
import json, statistics, time

durations_s = []
for _ in range({_WARMUP + _MEASURED}):
    began = time.perf_counter()
    product()
    durations_s.append(time.perf_counter() - began)
print(json.dumps(statistics.median(durations_s[{_WARMUP}:])))
"""


def _product_with_membench(threads: int, folder: Path) -> float | None:
    """Measure a product of numpy's as the fixture ``membench`` does."""
    names: dict[str, object] = {"__name__": "__main__"}
    exec(_PRODUCT, names)
    call = pickling.as_bytes((names["product"], (), {}), by_value=())
    (folder / "call").write_bytes(pickle.dumps(pickling.FunctionCall(sys.path, str(folder), dict(os.environ), call)))
    settings = {"warmup_steps": _WARMUP, "measured_steps": _MEASURED, "threads": threads}
    job = FunctionJob(
        id="product", repeat=0, device=Device.parse("cpu"), model="file", workload="product",
        pickled=folder / "call", raised=folder / "raised", settings=Settings.model_validate(settings),
    )  # fmt: skip
    with LocalExecutor(Needs((job.device,), job.threads, folder, PRELOADED), silent) as executor:
        return _calm_time(executor.measure(job))


def _calm_time(record: Record) -> float | None:
    """Return the median duration of a step in seconds; ``None`` if other processes disturbed it."""
    if record.status != "ok":
        raise SystemExit(f"{record.id}: {record.status}: {record.message}")
    return None if is_disturbed(record, "step_median_s") else record.metrics["step_median_s"]


def _plainly(code: str, *arguments: object) -> float:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return float(json.loads(ran.stdout))


def main() -> None:
    """Measure and print a row a case, as soon as it is known."""
    parser = argparse.ArgumentParser(description="membench's times against a plain loop's, measured in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-k", default="", help="only cases whose name contains this, such as generate/bf16")
    options = parser.parse_args()
    threads = environment.usable_cores()
    plain_arguments = (threads, _WARMUP, _MEASURED)
    cases: dict[str, tuple[Callable[[Path], float | None], Callable[[], float]]] = {
        f"{workload}/{kind}": (
            functools.partial(_with_membench, workload, technique, threads),
            functools.partial(_plainly, _PLAIN, workload, kind, *plain_arguments),
        )
        for workload in ("forward", "generate", "train")
        for kind, technique in (("fp32", "none"), ("bf16", "bf16"))
    }
    cases["numpy/product"] = functools.partial(_product_with_membench, threads), lambda: _plainly(_PLAIN_PRODUCT)
    print(f"{'case':20} {'membench':>11} {'plain':>11} {'ratio':>7}  ratios of the rounds")
    for name, (own, plain) in cases.items():
        if options.k in name:
            print(f"{name:20} {_in_turn(own, plain, options.rounds)}", flush=True)


def _in_turn(own: Callable[[Path], float | None], plain: Callable[[], float], rounds: int) -> str:
    pairs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append((own(Path(folder)), plain()))
    ratios = " ".join("~" if own_s is None else f"{own_s / plain_s:.3f}" for own_s, plain_s in pairs)
    calm = [(own_s, plain_s) for own_s, plain_s in pairs if own_s is not None]
    if not calm:
        return "other processes used the cores in all rounds"
    own_s, plain_s = (statistics.median(side) for side in zip(*calm, strict=True))
    return f"{own_s * 1e3:8.2f} ms {plain_s * 1e3:8.2f} ms {own_s / plain_s:7.3f}  {ratios}"


if __name__ == "__main__":
    main()
