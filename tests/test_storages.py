"""Bytes of tensors of every kind: each byte counts once, and none is missed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from membench.worker.breakdown import MemoryWatcher
from membench.worker.storages import Storages
from membench.worker.weights import bytes_by_module, weight_bytes

MIB = 2**20


class _Holder(nn.Module):
    """A module that holds tensors, or other objects, in attributes."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)


def _ones(mib: float) -> torch.Tensor:
    return torch.ones(int(mib * MIB / 4))


def test_views_of_a_storage_count_as_the_whole_of_it_once() -> None:
    whole = _ones(4)
    assert weight_bytes(_Holder(first=whole[:10], second=whole[10:20])) == 4 * MIB


def test_storages_that_overlap_count_each_byte_once() -> None:
    array = numpy.ones(MIB, numpy.uint8)  # each tensor of an array gets a storage of its own
    first, second = torch.from_numpy(array[: MIB * 3 // 4]), torch.from_numpy(array[MIB // 4 :])
    between = torch.from_numpy(array[MIB // 2 : MIB // 2 + 10])
    assert weight_bytes(_Holder(first=first, second=second, between=between)) == MIB


def test_storages_with_gaps_between_them_are_joined_by_one_that_covers_all() -> None:
    array = numpy.ones(1000, numpy.uint8)
    storages = Storages([torch.from_numpy(array[10:20]), torch.from_numpy(array[500:520])])
    assert storages.bytes == 30
    assert storages.add(torch.from_numpy(array[:600])) == 570
    assert storages.add(torch.from_numpy(array[5:15])) == 0
    assert storages.bytes == 600


@pytest.mark.parametrize("container", [list, tuple, lambda held: {"held": held}, lambda held: {"all": [held]}])
def test_tensors_in_containers_of_a_module_count(container: Any) -> None:
    held = container([_ones(1), _ones(2)]) if container in (list, tuple) else container(_ones(3))
    assert weight_bytes(_Holder(held=held)) == 3 * MIB


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_buffer_counts_with_its_indices(layout: str) -> None:
    blocks = {"blocksize": (2, 2)} if layout in ("bsr", "bsc") else {}
    sparse = getattr(torch.eye(64), "to_sparse" if layout == "coo" else f"to_sparse_{layout}")(**blocks)
    module = nn.Module()
    module.register_buffer("eye", sparse)
    names = {"coo": ("_indices", "_values")}.get(
        layout,
        ("crow_indices", "col_indices", "values")
        if layout in ("csr", "bsr")
        else ("ccol_indices", "row_indices", "values"),
    )
    # Some of them are a part of a larger storage, which stays.
    expected = sum(getattr(sparse, name)().untyped_storage().nbytes() for name in names)
    assert expected >= 64 * 4 + 64 * 8 if layout in ("coo", "csr", "csc") else 32 * 16 + 32 * 8
    assert weight_bytes(module) == expected
    assert [entry.bytes for entry in bytes_by_module(module)] == [expected]


def test_an_expanded_tensor_counts_as_what_it_holds() -> None:
    assert weight_bytes(_Holder(row=torch.ones(1, 1024).expand(1024, 1024))) == 4096


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_packed_weights_of_torch_ao_count() -> None:
    plain = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64, bias=False))
    packed = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})  # type: ignore[no-untyped-call]
    expected = 256 * 256 + 256 * 4 + 256 * 64
    assert weight_bytes(packed) == expected
    assert sum(entry.bytes for entry in bytes_by_module(packed)) == expected


def test_a_module_on_the_meta_device_counts_what_it_would_take() -> None:
    with torch.device("meta"):
        module = nn.Linear(256, 256)
    assert weight_bytes(module) == 4 * (256 * 256 + 256)


def test_categories_of_a_breakdown_share_no_byte() -> None:
    module = nn.Linear(512, 512, bias=False)
    inputs = torch.ones(512, 512)
    state = {"master": module.weight.data, "moment": torch.ones(512, 512)}
    watcher = MemoryWatcher(module, {"optimizer": lambda: state}, lambda: 5 * MIB, lambda: "forward")
    with watcher.watching():
        module(inputs).sum().backward()
    found = watcher.breakdown({"forward": 6 * MIB})["forward"]
    assert (found["weights"], found["optimizer"], found["gradients"]) == (MIB, MIB, MIB)
    assert sum(found.values()) == 6 * MIB


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The mesh of two ranks, of which this one is the first; nothing is sent."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def test_a_tensor_that_ranks_share_counts_with_this_ranks_part(mesh: DeviceMesh) -> None:
    module = nn.Linear(1024, 1024, bias=False)
    module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(0)], src_data_rank=None))
    assert weight_bytes(module) == 2 * MIB
    assert [entry.bytes for entry in bytes_by_module(module)] == [2 * MIB]
    assert Storages([module.weight]).bytes == 2 * MIB
