"""Estimates of techniques that ask for values, which fake tensors have not: weights are those of arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from membench.records.record import Record
from membench.worker.tracing.fake_modules import converting_fake_modules, making_fake_subclasses
from membench.worker.tracing.ledger import Ledger
from tests import parallel

_SUITE = """
[suite]
name = "values"
[matrix]
model = ["small"]
technique = ["none", "bnb-int8", "half-ffn", "half-heads", "half-layers", "masked", "csr", "student"]
workload = ["brief"]
device = ["cpu"]
[workload.brief]
use = "forward"
batch_size = 1
sequence_length = 32
[technique.half-ffn]
use = "prune-ffn"
[technique.half-heads]
use = "prune-heads"
[technique.half-layers]
use = "drop-layers"
[technique.masked]
use = "magnitude-prune"
[technique.csr]
use = "magnitude-prune"
sparsity = 0.75
storage = "csr"
[technique.student]
use = "from-scratch"
steps = 1
"""
_ATTENTION, _FFN = 4 * parallel.WIDTH**2, 3 * parallel.WIDTH * parallel.INNER_WIDTH
"""Weights of the linear layers in one of the decoder's."""
_ROWS = 4 * parallel.WIDTH + 2 * parallel.INNER_WIDTH + parallel.WIDTH
_MATRICES = 7


@pytest.fixture(scope="module")
def estimates(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Record]:
    return parallel.estimates(_SUITE, tmp_path_factory.mktemp("values"))


@pytest.mark.parametrize(
    ("technique", "saved_by_layer"),
    [
        ("bnb-int8", 3 * (_ATTENTION + _FFN) - 4 * _ROWS),
        ("half-ffn", 4 * _FFN // 2),
        ("half-heads", 4 * _ATTENTION // 2),
        ("half-layers", parallel.LAYER_BYTES // 2),
        ("student", parallel.LAYER_BYTES // 2),
        ("masked", -3 * 4 * (_ATTENTION + _FFN)),
        ("csr", 2 * (_ATTENTION + _FFN) - 4 * (_ROWS + _MATRICES)),
    ],
)
def test_what_a_technique_saves_is_that_of_arithmetic(
    estimates: Mapping[str, Record], technique: str, saved_by_layer: int
) -> None:
    whole, found = (estimates[name].metrics["weights_bytes"] for name in ("none", technique))
    assert whole is not None
    assert found is not None
    assert whole - found == parallel.LAYERS * saved_by_layer


@pytest.mark.parametrize("technique", ["half-ffn", "csr"])
def test_what_was_taken_for_values_is_named(estimates: Mapping[str, Record], technique: str) -> None:
    source = estimates[technique].obtained["peak_live_bytes"]["source"]
    assert "depends on values" in source
    assert ("how many numbers of each matrix are not zero" in source) == (technique == "csr")


def test_what_asks_for_no_values_leaves_out_none(estimates: Mapping[str, Record]) -> None:
    assert "values" not in estimates["none"].obtained["peak_live_bytes"]["source"]


def test_of_a_mask_all_places_are_taken() -> None:
    fake = FakeTensorMode()
    with fake, Ledger(fake, lambda size: size):
        table, mask = torch.zeros(6, 5), torch.zeros(6, dtype=torch.bool)
        assert table[mask].shape == (6, 5)
        assert table[:, torch.zeros(5, dtype=torch.bool)].shape == (6, 5)
        assert mask.nonzero().shape == (6, 1)
        assert torch.bincount(mask.long(), minlength=9).shape == (9,)


def test_tensors_on_the_meta_device_take_no_memory() -> None:
    fake = FakeTensorMode()
    with fake, Ledger(fake, lambda size: size) as ledger, converting_fake_modules():
        module = torch.nn.Linear(8, 8, bias=False)
        assert ledger.live_bytes == 4 * 64
        module.to("meta")
        assert ledger.live_bytes == 0


def test_a_librarys_parameter_holds_a_fake_tensor() -> None:
    class Coded(torch.nn.Parameter):
        pass

    with FakeTensorMode(), making_fake_subclasses():
        made = torch.Tensor._make_subclass(Coded, torch.zeros(4, 4))
        assert isinstance(made, Coded)
        made.data = torch.zeros(8, dtype=torch.uint8)
        assert (made.shape, made.dtype) == ((8,), torch.uint8)
