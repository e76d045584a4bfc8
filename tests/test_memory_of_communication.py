"""What ranks hold by category, by arithmetic: each rank's share of the model, and its memory for collectives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from membench.worker.breakdown import MemoryWatcher
from membench.worker.communication_memory import Buckets, free_gathered
from membench.worker.weights import weight_bytes
from tests.on_ranks import on_ranks

_WIDTH, _INNER, _LAYERS, _ROWS = 64, 128, 3, 8
_HEAD = _WIDTH * _WIDTH * 4
_LAYER = 2 * _WIDTH * _INNER * 4
_WEIGHTS = _LAYERS * _LAYER + _HEAD
_BETWEEN, _WITHIN = _ROWS * _WIDTH * 4, _ROWS * _INNER * 4
"""Bytes of the activations between layers, and of those within one."""


def _module() -> nn.Sequential:
    """Return layers of two products with an activation between them, and a head; all of them without bias."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(_WIDTH, _INNER, bias=False), nn.ReLU(), nn.Linear(_INNER, _WIDTH, bias=False))
        for _ in range(_LAYERS)
    ]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, _WIDTH, bias=False))


def _looked_at(module: nn.Module, run: nn.Module, inventory: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return what a rank holds after the layers, the forward pass, the backward pass and the optimizer's step."""
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    rows = torch.randn(_ROWS, _WIDTH)
    for _ in range(3):
        optimizer.zero_grad()
        run(rows).square().mean().backward()
        optimizer.step()
    inventory = {**inventory, "optimizer": lambda: optimizer.state}
    now, part = itertools.count(), "layers"
    watcher = MemoryWatcher(module, inventory, lambda: next(now), lambda: part)
    with watcher.watching():
        optimizer.zero_grad()
        loss = run(rows).square().mean()
        part = "forward"
        watcher.sample()
        part = "backward"
        loss.backward()
        del loss
        watcher.sample()
        optimizer.step()
        part = "optimizer"
        watcher.sample()
        part = "after"
    found = watcher.breakdown({})
    return {name: {key: size for key, size in sizes.items() if key != "other"} for name, sizes in found.items()}


def _held() -> dict[str, dict[str, dict[str, int]]]:
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, views in (("ddp", False), ("ddp with views", True)):
        module = _module()
        wrapper = DistributedDataParallel(module, gradient_as_bucket_view=views)
        found[name] = _looked_at(module, wrapper, {"communication": Buckets(wrapper)})
    module = _module()
    for layer in itertools.islice(module, _LAYERS):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    found["fsdp"] = _looked_at(module, module, {})
    with torch.no_grad():
        module(torch.randn(_ROWS, _WIDTH))
    gathered = weight_bytes(module)
    free_gathered(module)
    found["fsdp after a forward pass"] = {"weights": {"gathered": gathered, "freed": weight_bytes(module)}}
    module = _module()
    for layer in itertools.islice(module, _LAYERS):
        parallelize_module(layer, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found["tensor-parallel"] = _looked_at(module, module, {})
    return found


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    first, second = on_ranks(_held, tmp_path_factory.mktemp("ranks"))
    assert first == second
    return first


def _states(weights_bytes: int) -> int:
    """AdamW's two moments, and a count of steps for each of the seven parameters."""
    return 2 * weights_bytes + 7 * 4


_OF_LAYERS = _LAYERS * (_BETWEEN + _WITHIN)
"""The input of a layer, and what is between its products."""


def test_ddp_holds_its_buckets_beside_the_gradients(held: dict[str, dict[str, dict[str, int]]]) -> None:
    alike = {"weights": _WEIGHTS, "communication": _WEIGHTS, "optimizer": _states(_WEIGHTS)}
    assert held["ddp"]["forward"] == alike | {"gradients": 0, "activations": _OF_LAYERS + 2 * _BETWEEN}
    assert held["ddp"]["backward"] == alike | {"gradients": _WEIGHTS, "activations": 0}


def test_buckets_that_gradients_are_views_of_count_once_and_stay_when_gradients_are_dropped(
    held: dict[str, dict[str, dict[str, int]]],
) -> None:
    for part, gradients, communication in (("forward", 0, _WEIGHTS), ("backward", _WEIGHTS, 0)):
        found = held["ddp with views"][part]
        assert (found["gradients"], found["communication"]) == (gradients, communication)


def test_fsdp_holds_a_share_of_everything_and_gathered_weights_are_no_activations(
    held: dict[str, dict[str, dict[str, int]]],
) -> None:
    alike = {"weights": _WEIGHTS // 2, "optimizer": _states(_WEIGHTS // 2)}
    # The head is of the root's group, which stays gathered; the buffer of the last gathering is freed after it.
    assert held["fsdp"]["layers"] == alike | {
        "gradients": 0, "communication": _LAYER + _HEAD, "activations": _OF_LAYERS + _BETWEEN,
    }  # fmt: skip
    assert held["fsdp"]["forward"] == alike | {
        "gradients": 0, "communication": _HEAD, "activations": _OF_LAYERS + 2 * _BETWEEN,
    }  # fmt: skip
    assert held["fsdp"]["backward"] == alike | {"gradients": _WEIGHTS // 2, "communication": 0, "activations": 0}


def test_weights_that_fsdp_keeps_gathered_after_a_forward_pass_are_freed_before_weights_are_counted(
    held: dict[str, dict[str, dict[str, int]]],
) -> None:
    assert held["fsdp after a forward pass"]["weights"] == {
        "gathered": _WEIGHTS // 2 + _HEAD // 2, "freed": _WEIGHTS // 2,
    }  # fmt: skip


def test_tensor_parallel_holds_a_share_of_what_it_splits_and_the_whole_of_the_rest(
    held: dict[str, dict[str, dict[str, int]]],
) -> None:
    own = _LAYERS * _LAYER // 2 + _HEAD
    # Inputs of layers are on all ranks; what is between the two products of a layer is split.
    activations = _LAYERS * (_BETWEEN + _WITHIN // 2) + 2 * _BETWEEN
    assert held["tensor-parallel"]["forward"] == {
        "weights": own, "gradients": 0, "activations": activations, "optimizer": _states(own),
    }  # fmt: skip
    assert held["tensor-parallel"]["optimizer"]["gradients"] == own
