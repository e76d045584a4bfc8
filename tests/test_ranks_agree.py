"""Ranks take the same way where a clock, a loss or an error of one of them would let them part."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import distributed, nn

from membench.cli import main
from membench.plugins import Context, Parallel
from membench.records.record import Record
from membench.records.run_file import newest_run, read_run
from membench.worker import agreement, checkpoint, quality
from membench.worker.kernels import Kernels
from tests.on_ranks import on_ranks


class _Fails(Parallel):
    """The second rank cannot write its part of a checkpoint."""

    splits_model: ClassVar[bool] = True

    def save(self, module: nn.Module, folder: Path, context: Context) -> str | None:
        assert context.ranks is not None
        if context.ranks.number == 1:
            raise OSError("the disk is full")
        folder.mkdir()
        (folder / "part").write_bytes(bytes(100))
        return "its part"


def _saved(ranks: Any) -> list[tuple[int | None, str]]:
    context: Any = SimpleNamespace(ranks=ranks)
    module = nn.Linear(8, 8)
    found = [checkpoint.save(module, ranks.shared, [_Fails.model_validate({})], context)]
    free_bytes = module.weight.nbytes + (2**20 if ranks.number else 0)
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=free_bytes)):
        return [*found, checkpoint.save(module, ranks.shared, [_Fails.model_validate({})], context)]


def _rehearsed(ranks: Any, scratch: Path) -> list[str | None]:
    """What the rehearsals returned whose first one failed on the second rank, with a kernel that was there."""
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    returned: list[str | None] = []

    def rehearse() -> str | None:
        distributed.barrier()
        library = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "broken.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        if ranks.number == 1:
            library.touch()
        returned.append("file too short" if ranks.number == 1 and not returned else None)
        return returned[-1]

    with mock.patch("membench.worker.kernels._fingerprint", return_value=f"of-{ranks.number}"):
        request: Any = None
        Kernels(request, "cpu", scratch).used_by(rehearse, ranks)
    return returned


def _tokens_judged(ranks: Any) -> int:
    """The tokens of a piece of text for a model that takes any number of them on the first rank alone."""
    model: Any = SimpleNamespace(vocabulary=lambda _: 256, max_tokens=lambda: None, encode=lambda _: None)
    workload: Any = SimpleNamespace(
        decoded_tokens_per_step=lambda: None, corpus=lambda: None, longest_sequence=lambda: 16
    )  # fmt: skip
    context: Any = SimpleNamespace(ranks=ranks, device="cpu")

    def logits(ids: torch.Tensor) -> torch.Tensor:
        if ranks.number == 1 and len(ids) > 16:
            raise IndexError("no position is left")
        return torch.zeros(len(ids), 256)

    found, _ = quality._pieces_of_logits(model, nn.Identity(), workload, logits, context)
    return len(found[0].ids) - 1


def _agreed(folder: Path) -> dict[str, Any]:
    number = distributed.get_rank()
    ranks: Any = SimpleNamespace(number=number, of=2, shared=folder, degree=lambda dimension: 2)
    scratch = folder / str(number)
    scratch.mkdir()
    return {
        "saved": _saved(ranks),
        "rehearsed": _rehearsed(ranks, scratch),
        "tokens": _tokens_judged(ranks),
        "first": [agreement.decided_by_first(ranks, number == 0), agreement.decided_by_first(ranks, number == 1)],
        "any": [agreement.on_any(ranks, number == 1), agreement.on_any(ranks, False)],
    }


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("agreed")
    return on_ranks(functools.partial(_agreed, folder), folder)


def test_the_first_rank_decides_for_all_and_a_fact_of_any_rank_is_known_to_all(agreed: list[dict[str, Any]]) -> None:
    assert [rank["first"] for rank in agreed] == [[True, False]] * 2
    assert [rank["any"] for rank in agreed] == [[True, False]] * 2


def test_no_rank_has_a_checkpoint_that_one_cannot_write_or_has_no_room_for(agreed: list[dict[str, Any]]) -> None:
    (first, first_room), (second, second_room) = (rank["saved"] for rank in agreed)
    assert first == (None, "the checkpoint cannot be written: OSError: another rank cannot write its part")
    assert second == (None, "the checkpoint cannot be written: OSError: the disk is full")
    assert first_room == second_room
    assert first_room[1].startswith("not enough room in ")


def test_all_ranks_rehearse_again_where_the_kernels_of_one_were_broken(agreed: list[dict[str, Any]]) -> None:
    assert [rank["rehearsed"] for rank in agreed] == [[None, None], ["file too short", None]]


def test_all_ranks_judge_shorter_pieces_where_one_takes_no_longer_ones(agreed: list[dict[str, Any]]) -> None:
    assert [rank["tokens"] for rank in agreed] == [16, 16]


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
