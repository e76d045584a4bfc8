"""Ranks take the same way where a clock, a loss or an error of one of them would let them part."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from membench.cli import main
from membench.records.record import Record
from membench.records.run_file import newest_run, read_run
from membench.worker import agreement
from tests.on_ranks import on_ranks


def _agreed() -> dict[str, Any]:
    number = distributed.get_rank()
    ranks: Any = SimpleNamespace(number=number)
    return {
        "first": [agreement.decided_by_first(ranks, number == 0), agreement.decided_by_first(ranks, number == 1)],
        "any": [agreement.on_any(ranks, number == 1), agreement.on_any(ranks, False)],
    }


def test_the_first_rank_decides_for_all_and_a_fact_of_any_rank_is_known_to_all(tmp_path: Path) -> None:
    assert on_ranks(_agreed, tmp_path) == [{"first": [True, False], "any": [True, False]}] * 2


def test_without_ranks_one_decides_for_oneself() -> None:
    assert [agreement.decided_by_first(None, fact) for fact in (True, False)] == [True, False]
    assert [agreement.on_any(None, fact) for fact in (True, False)] == [True, False]
    agreement.come_through(None, "rehearsal", ValueError("of no consequence"))


def test_an_error_counts_where_another_rank_does_not_come_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_WAIT_S", 0.2)
    first, second = (SimpleNamespace(number=number, of=2, shared=tmp_path) for number in (0, 1))
    ranks: Any = first
    with pytest.raises(ValueError, match="stage 0 has no layers"):
        agreement.come_through(ranks, "rehearsal", ValueError("stage 0 has no layers"))
    other: Any = second
    for _ in range(2):  # what failed may be tried again
        agreement.come_through(other, "saving")
        began_s = time.monotonic()
        agreement.come_through(ranks, "saving", ValueError("stage 0 has no layers"))
        assert time.monotonic() - began_s < 0.2


_SUITE = """
[suite]
name = "parting"
[matrix]
model = ["untrained-tiny"]
technique = ["none"]
workload = ["short"]
device = ["cpu"]
[[include]]
model = "untrained-tiny"
technique = "talks"
workload = "short"
device = "2xcpu"
[[include]]
model = "classifier"
technique = "breaks"
workload = "few"
device = "2xcpu"
[workload.short]
use = "forward"
batch_size = 2
sequence_length = 32
[workload.few]
use = "train-classifier"
steps = 40
[settings]
measured_steps = 2
timeout_s = 60
evaluate_s = 0.6
"""
_PLUGINS = """
import dataclasses, time
from typing import ClassVar
from membench.builtin.techniques.parallel.data_parallel import DistributedDataParallel
from membench.plugins import Parallel

class Talks(Parallel):
    '''Every forward pass meets the other rank; after that, the first rank takes its time over a held-out text.'''

    dimension: ClassVar = "tensor"

    def parallelize(self, module, context):
        from torch import distributed

        def meet(module, given, returned):
            distributed.barrier()
            if context.ranks.number == 0 and given[0].shape[-1] > 100:
                time.sleep(0.4)

        module.register_forward_hook(meet)
        return module

class Breaks(DistributedDataParallel):
    '''The loss of the second rank is not finite after some steps.'''

    def training_step(self, step, context):
        losses = []

        def loss(module, rows):
            losses.append(step.loss(module, rows))
            broken = context.ranks.number == 1 and len(losses) > 15
            return losses[-1] * float("inf") if broken else losses[-1]

        return super().training_step(dataclasses.replace(step, loss=loss), context)
"""


@pytest.fixture(scope="module")
def parting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("parting")
    (folder / "membench_plugins.py").write_text(_PLUGINS)
    (folder / "suite.toml").write_text(_SUITE)
    main(["run", str(folder / "suite.toml"), "--output", str(folder / "results")])
    return {record.id: record for record in read_run(newest_run(folder / "results")).records}


def test_ranks_judge_the_same_text_though_their_clocks_differ_and_the_first_reports_it(
    parting: dict[str, Record],
) -> None:
    record = parting["untrained-tiny/talks/short/2xcpu"]
    assert (record.status, record.message) == ("ok", None)
    first, second = record.processes
    assert first.quality is not None
    # Its time is over after one piece, and that of the second rank, which has not slept since, is not.
    assert len(first.quality.tokens) == 1
    assert second.quality is None
    assert record.metrics["kl_nats"] == pytest.approx(0, abs=1e-6)


def test_all_ranks_stop_where_the_training_of_one_diverges(parting: dict[str, Record]) -> None:
    record = parting["classifier/breaks/few/2xcpu"]
    assert record.status == "diverged"
    assert record.message is not None
    assert record.message.startswith("rank 1: the training loss became ")
    first, second = (process.losses_nats or () for process in record.processes)
    assert len(first) == len(second)
    assert None not in first
    assert second[-1] is None
