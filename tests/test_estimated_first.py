"""A case that is estimated to need more memory than there is ends at once, unless it is to be tried."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import membench
from membench.builtin.models.transformer import Llama
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.train import Train
from membench.cli import main
from membench.errors import EXIT_CASES_FAILED
from membench.protocol.messages import AsksForEstimate
from membench.protocol.readings import RankEstimate
from membench.records.record import Record
from membench.records.run_file import newest_run, read_run
from membench.running import refusing
from membench.running.jobs.case import CaseJob
from membench.running.jobs.from_case import job_from_case
from membench.worker import fitting

_VOCABULARY, _SEQUENCE, _BATCH = 32_000, 2048, 65_536
_LOGITS_BYTES = 4 * _BATCH * _SEQUENCE * _VOCABULARY
_SUITE = f"""
[suite]
name = "wide"
plugins = "unreadable.py"
[matrix]
model = ["unreadable", "unestimable"]
technique = ["none"]
workload = ["brief"]
device = ["cpu"]
[[include]]
model = "llama-15m"
technique = ["none", "tensor-parallel"]
workload = "wide"
device = ["cpu", "2xcpu"]
[workload.brief]
use = "forward"
[model.unestimable]
use = "unreadable"
runs = false
[workload.wide]
use = "forward"
batch_size = {_BATCH}
sequence_length = {_SEQUENCE}
[settings]
timeout_s = 60
measured_steps = 1
evaluate_s = 0
calm_within_s = 0
"""
_UNREADABLE = '''
from membench.plugins import Model


class Unreadable(Model):
    """Larger than any memory by its skeleton, of unknown size otherwise, and never built."""

    runs: bool = True

    def skeleton(self):
        import torch

        module = torch.nn.Embedding(2**38, 64, device="meta")
        if not self.runs:
            module.forward = None
        return module

    def build(self, context):
        raise MemoryError("it was tried")
'''
_FREE = AsksForEstimate(1000, "available on this machine")


def _records(folder: Path, *options: str) -> dict[str, Record]:
    (folder / "unreadable.py").write_text(_UNREADABLE)
    (folder / "suite.toml").write_text(_SUITE)
    output = folder / "results"
    assert main(["run", str(folder / "suite.toml"), "--output", str(output), *options]) == EXIT_CASES_FAILED
    return {record.id: record for record in read_run(newest_run(output)).records}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    return _records(tmp_path_factory.mktemp("estimated-first"))


def test_a_case_that_loads_but_is_estimated_not_to_run_ends_before_anything_is_built(
    records: dict[str, Record],
) -> None:
    record = records["llama-15m/none/wide/cpu"]
    assert (record.status, record.ended_in, len(record.processes[0].phases)) == ("out-of-memory", None, 0)
    needed = re.fullmatch(
        r"it is estimated to need (.*) TiB at the live peak; .*iB are available on this machine"
        r" \(traced: the case's own stages on fake tensors\)\. --no-estimate tries it",
        str(record.message),
    )
    assert needed is not None, record.message
    assert 1 < float(needed[1]) * 2**40 / _LOGITS_BYTES < 1.2


def test_ranks_on_a_cpu_share_its_memory_and_none_waits_for_another(records: dict[str, Record]) -> None:
    record = records["llama-15m/tensor-parallel/wide/2xcpu"]
    assert record.status == "out-of-memory"
    assert "its 2 ranks are together estimated to need" in str(record.message)


def test_a_case_is_tried_if_it_cannot_be_estimated(records: dict[str, Record]) -> None:
    assert "it is estimated to need 64.00 TiB" in str(records["unreadable/none/brief/cpu"].message)
    assert "it was tried" in str(records["unestimable/none/brief/cpu"].message)


def test_a_case_is_tried_if_that_is_asked_for(tmp_path: Path) -> None:
    (record,) = _records(tmp_path, "--no-estimate", "-k", "unreadable/").values()
    assert record.status == "out-of-memory"
    assert "it was tried" in str(record.message)


def _estimate(peak_bytes: int, ranks: Sequence[int] = (0,), **more: int) -> RankEstimate:
    figures = {"peak_live_bytes": peak_bytes, **more}
    return RankEstimate(ranks=ranks, how="traced", figures=figures, peak_part="backward")


def _job(device: str) -> CaseJob:
    suite = membench.load_suite("parallel", [device])
    case = next(case for case in suite.cases if case.device == device)
    job = job_from_case(case, 0, suite.settings)
    assert isinstance(job, CaseJob)
    return job


def test_what_exactly_fits_is_started() -> None:
    on_cpu = _job("cpu")
    assert refusing.refusal(on_cpu, [_FREE], [_estimate(1000)]) is None
    refused = refusing.refusal(on_cpu, [_FREE], [_estimate(1001)])
    assert refused is not None
    assert "1001 B in backward; 1000 B are available" in refused
    refused = refusing.refusal(on_cpu, [_FREE], [_estimate(900, load_peak_live_bytes=1100)])
    assert refused is not None
    assert "1.074 KiB at the load peak" in refused
    assert refusing.refusal(on_cpu, [_FREE], []) is None


def test_ranks_on_a_cpu_need_the_sum_and_each_gpu_its_own() -> None:
    alike, other = _estimate(300, (0, 1)), _estimate(401, (2,))
    assert "need 1001 B" in str(refusing.refusal(_job("2xcpu"), [_FREE], [alike, other]))
    gpu = _job("2xcuda")
    assert refusing.refusal(gpu, [_FREE], [alike, other]) is None
    full = dataclasses.replace(_FREE, free_bytes=400)
    assert "need 401 B" in str(refusing.refusal(gpu, [_FREE, full], [alike, other]))


def test_only_what_comes_near_the_free_memory_asks_for_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Llama.model_validate({"size": "15m"})
    weights, tokens = sum(each.nbytes for each in model.skeleton().parameters()), 2 * 128
    monkeypatch.setattr(fitting, "available_bytes", lambda: 8 * (weights + tokens * _VOCABULARY * 4))
    forward = Forward.model_validate({"batch_size": 2, "sequence_length": 128})
    fitting.find_near_memory(model, forward, "cpu")
    for workload, ranks in ((forward, 2), (Train.model_validate({"batch_size": 2, "sequence_length": 128}), 1)):
        with pytest.raises(fitting.NearMemory, match="that are available on this machine"):
            fitting.find_near_memory(model, workload, "cpu", ranks)
