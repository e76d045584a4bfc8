"""Notes on shortfalls where ranks share a model: nominal factors are held against this rank's share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from membench.plugins import Context, Parallel, Technique, registry
from membench.testing import context
from membench.worker import converted_layers, notes

_ROWS, _COLUMNS = 512, 256


class _Sharded(Parallel):
    """Splits weights."""

    splits_model: ClassVar[bool] = True

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        return module


class _EightBit(Technique):
    """Weights of 8 bits, and optimizer states of a byte for each moment."""

    def nominal_bits(self) -> float:
        return 8

    def nominal_state_bytes(self) -> float:
        return 2


class _States(Technique):
    """Optimizer states of a byte for each moment."""

    def nominal_state_bytes(self) -> float:
        return 2


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The mesh of two ranks, of which this one is the first; nothing is sent."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def _sharded(mesh: DeviceMesh, kind: torch.dtype) -> nn.Module:
    module = nn.Linear(_COLUMNS, _ROWS, bias=False)
    whole = module.weight.data.to(kind)
    shared = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    module.weight = nn.Parameter(shared, whole.is_floating_point())
    return module


def test_a_shard_is_what_the_nominal_factor_is_about(mesh: DeviceMesh) -> None:
    plain = notes.PlainWeights.of(nn.Linear(_COLUMNS, _ROWS, bias=False))
    assert notes.on_weights(_sharded(mesh, torch.float32), [_Sharded.model_validate({})], plain) == []
    eight_bit = [_EightBit.model_validate({}), _Sharded.model_validate({})]
    assert notes.on_weights(_sharded(mesh, torch.int8), eight_bit, plain) == []
    assert notes.on_weights(_sharded(mesh, torch.float32), eight_bit, plain) == [
        "weights are ×0.50 where ×0.12 is the nominal factor: 256.0 KiB of Linear layers left in float32"
    ]


def test_a_share_of_the_model_that_no_tensor_tells_has_no_nominal_factor() -> None:
    plain = notes.PlainWeights.of(nn.Sequential(nn.Linear(_COLUMNS, _ROWS), nn.Linear(_ROWS, _COLUMNS)))
    stage = nn.Linear(_COLUMNS, _ROWS)
    assert notes.on_weights(stage, [_Sharded.model_validate({})], plain) == []
    assert notes.on_weights(stage, [], plain) != []


def test_states_of_8_bits_that_became_32_under_sharding_are_named(mesh: DeviceMesh) -> None:
    weight = _sharded(mesh, torch.float32).weight
    assert isinstance(weight, nn.Parameter)

    def said(kind: torch.dtype) -> list[str]:
        moments = torch.zeros(_ROWS, _COLUMNS, dtype=kind)
        states: dict[torch.Tensor, dict[str, Any]] = {
            weight: {name: distribute_tensor(moments, mesh, [Shard(0)], src_data_rank=None) for name in ("m", "v")}
        }
        return notes.on_states(states, [weight], [_EightBit.model_validate({}), _Sharded.model_validate({})])

    assert said(torch.uint8) == []
    assert said(torch.float32) == [
        "optimizer states are ×1.000 where ×0.25 is the nominal factor: 512.0 KiB of moments in float32"
    ]


def test_a_rank_that_keeps_states_of_some_parameters_alone_misses_none(mesh: DeviceMesh) -> None:
    del mesh
    module = nn.Sequential(nn.Linear(_COLUMNS, _ROWS, bias=False), nn.Linear(_ROWS, _COLUMNS, bias=False))
    first = next(module.parameters())
    states = {first: {name: torch.zeros(_ROWS, _COLUMNS, dtype=torch.uint8) for name in ("m", "v")}}

    class Shared(_Sharded):
        shares_states: ClassVar[bool] = True
        splits_model: ClassVar[bool] = False

    def said(parallel: Technique) -> list[str]:
        class Holder:
            inventory: ClassVar = {"optimizer": lambda: states}

        context: Any = Holder()
        techniques = [_States.model_validate({}), parallel]
        return notes.on_weights_and_states(module, context, techniques, notes.PlainWeights.of(module))

    assert said(Shared.model_validate({})) == []
    assert said(_Sharded.model_validate({})) == [
        "optimizer states are ×0.12 where ×0.25 is the nominal factor: 256.0 KiB of states not yet made"
    ]


@pytest.mark.parametrize("name", ["fsdp", "tensor-parallel", "pipeline"])
def test_what_was_to_split_the_model_and_left_it_whole_is_named_though_it_acts_in_steps_too(
    name: str, tmp_path: Path
) -> None:
    technique = registry.create("technique", name, {})
    on_rank = dataclasses.replace(context(tmp_path), idle=[technique])
    assert converted_layers.remarks([name], [technique], on_rank) == [f"'{name}' changed nothing in the model"]
