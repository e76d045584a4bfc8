"""Spreading a case over ranks: degrees of a mesh, shares of a batch, and metrics over ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from membench.host.device import Device
from membench.plugins import Context, Dimension, Parallel, Setting, Unsuitable, own_rows, registry
from membench.plugins.parallel import degrees
from membench.running.derived_metrics import DerivedMetrics
from membench.running.over_ranks import combine

_MIB = 2**20


class _Data(Parallel):
    """Shares the batch."""

    shares_batch: ClassVar[bool] = True

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        return module


class _Tensor(_Data):
    """Splits tensors."""

    dimension: ClassVar[Dimension] = "tensor"
    shares_batch: ClassVar[bool] = False


def _data(degree: int | None = None) -> _Data:
    return _Data.model_validate({} if degree is None else {"degree": degree})


def _tensor(degree: int | None = None) -> _Tensor:
    return _Tensor.model_validate({} if degree is None else {"degree": degree})


@pytest.mark.parametrize(
    ("techniques", "of", "expected"),
    [
        ((_data(),), 1, {"data": 1}),
        ((_data(),), 4, {"data": 4}),
        # Inner dimensions take 2 where nothing is written, in whatever order the stack names them.
        ((_tensor(), _data()), 8, {"data": 4, "tensor": 2}),
        ((_data(2), _tensor(4)), 8, {"data": 2, "tensor": 4}),
        ((_data(), _tensor(4)), 8, {"data": 2, "tensor": 4}),
    ],
)
def test_degrees_multiply_to_the_ranks_and_the_outermost_takes_what_is_left(
    techniques: tuple[Parallel, ...], of: int, expected: dict[str, int]
) -> None:
    found = degrees(techniques, of)
    assert found == expected
    assert list(found) == list(expected), "the outermost dimension comes first"


@pytest.mark.parametrize(
    ("techniques", "of", "reason"),
    [
        ((_data(3),), 4, "the degrees 3 (data) of the stack do not multiply to 4 ranks"),
        ((_data(), _tensor()), 3, "the degrees 1 (data) x 2 (tensor) of the stack do not multiply to 3 ranks"),
        ((_data(), _tensor()), 2, "2 ranks leave a degree of 1 along 'data': the degrees are 1 (data) x 2 (tensor)"),
    ],
)
def test_degrees_that_do_not_fit_the_ranks_are_refused(techniques: tuple[Parallel, ...], of: int, reason: str) -> None:
    with pytest.raises(Unsuitable) as caught:
        degrees(techniques, of)
    assert str(caught.value) == reason


def _setting(ranks: int | None, batch_size: int = 2, *after: Parallel) -> Setting:
    workload = registry.create("workload", "train", {"batch_size": batch_size})
    return Setting(registry.create("model", "untrained-tiny", {}), workload, "cpu", (), after, ranks)


def test_a_case_that_cannot_be_spread_is_refused_with_the_reason() -> None:
    assert _data().refuse(_setting(2)) is None
    assert _tensor().refuse(_setting(2, 3)) is None, "only a technique that shares the batch asks for even shares"
    assert _data().refuse(_setting(2, 3)) == "a batch of 3 cannot be shared among 2 ranks"
    assert _data().refuse(_setting(4, 4, _data())) == "the stack names two techniques that split the data over ranks"
    several = "it spreads a case over several devices: name them as device = '2xcpu' or '2xcuda'"
    assert _data().refuse(_setting(None)) == several


def test_a_count_makes_ranks_even_if_it_is_one() -> None:
    one, two, without = Device.parse("1xcuda"), Device.parse("2xcuda"), Device.parse("cuda")
    assert [str(device) for device in (one, two, without)] == ["1xcuda", "2xcuda", "cuda"]
    assert [device.in_ranks for device in (one, two, without)] == [True, True, False]
    assert [list(map(str, device.ranks)) for device in (one, two)] == [["cuda:0"], ["cuda:0", "cuda:1"]]
    assert {str(device.single) for device in (one, two, without)} == {"cuda"}


def _rank(peak_bytes: int | None, **more: Any) -> DerivedMetrics:
    found = DerivedMetrics()
    if peak_bytes is None:
        found.add_unknown("peak_live_bytes", "it ended")
    else:
        found.add("peak_live_bytes", peak_bytes, "kernel", resolution_bytes=_MIB)
    for name, value in more.items():
        found.add(name, value, "clock")
    return found


def test_memory_is_the_highest_ranks_and_the_total_and_the_imbalance_stand_beside_it() -> None:
    found = combine([_rank(30 * _MIB), _rank(10 * _MIB)])
    assert found.metrics["peak_live_bytes"] == 30 * _MIB
    assert found.obtained["peak_live_bytes"]["rank"] == 0
    assert found.metrics["total_peak_live_bytes"] == 40 * _MIB
    assert found.obtained["total_peak_live_bytes"]["resolution_bytes"] == 2 * _MIB
    assert found.metrics["imbalance_ratio"] == 1.5


def test_the_slowest_rank_gives_the_time_and_energy_adds_up() -> None:
    first = _rank(_MIB, step_median_s=0.25, tokens_per_s=1000.0, energy_j=5.0)
    second = _rank(_MIB, step_median_s=0.5, tokens_per_s=500.0, energy_j=7.0)
    found = combine([first, second]).metrics
    assert (found["step_median_s"], found["tokens_per_s"], found["energy_j"]) == (0.5, 500.0, 12.0)


def test_a_peak_that_one_rank_does_not_know_is_unknown_and_names_the_rank() -> None:
    found = combine([_rank(30 * _MIB), _rank(None)])
    assert found.metrics["peak_live_bytes"] is None
    assert found.reasons["peak_live_bytes"] == "rank 1: it ended"
    assert found.metrics["total_peak_live_bytes"] is None


def test_a_bound_of_one_rank_makes_the_worst_ranks_figure_a_bound() -> None:
    first, second = _rank(30 * _MIB), DerivedMetrics()
    second.add("peak_live_bytes", 10 * _MIB, "sampled", "at least", resolution_bytes=_MIB)
    assert combine([first, second]).obtained["peak_live_bytes"]["bound"] == "at least"


def test_bounds_of_both_kinds_make_an_estimate_and_an_imbalance_is_never_a_bound() -> None:
    first, second = DerivedMetrics(), DerivedMetrics()
    first.add("peak_live_bytes", 30 * _MIB, "kernel", "at most", at_least_bytes=20 * _MIB)
    second.add("peak_live_bytes", 10 * _MIB, "sampled", "at least")
    mixed, of_one_kind = combine([first, second]).obtained, combine([second, second]).obtained
    # The true peaks may be 25 and 24 MiB: less than 30, and more than 40 in all.
    assert {mixed[field]["bound"] for field in ("peak_live_bytes", "total_peak_live_bytes")} == {"about"}
    assert of_one_kind["total_peak_live_bytes"]["bound"] == "at least"
    assert of_one_kind["imbalance_ratio"]["bound"] == "about"


def test_the_file_that_one_rank_writes_is_the_jobs() -> None:
    first, second = _rank(_MIB, disk_bytes=77), _rank(_MIB)
    second.add_unknown("disk_bytes", "rank 0 writes it")
    assert combine([first, second]).metrics["disk_bytes"] == 77


def test_each_rank_takes_its_own_rows_of_the_batch() -> None:

    batch = torch.arange(8).view(4, 2)
    ranks = SimpleNamespace(degree=lambda dimension: 2, place=lambda dimension: 1)
    context: Any = SimpleNamespace(ranks=ranks)
    assert own_rows(batch, (_data(),), context).tolist() == [[4, 5], [6, 7]]
    assert own_rows(batch, (_tensor(),), context).tolist() == batch.tolist()
