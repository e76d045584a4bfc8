"""Bytes that ranks hand to collectives in a step, by arithmetic, and the time that they wait for each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from membench.cli import main
from membench.records.record import Record
from membench.records.run_file import newest_run, read_run
from membench.worker.communication import collective_of, communicated_bytes
from tests.on_ranks import on_ranks

_WIDTH, _INNER, _LAYERS, _ROWS = 64, 128, 3, 8
_WEIGHTS = _LAYERS * 2 * _WIDTH * _INNER * 4
_ACTIVATIONS = _ROWS * _WIDTH * 4
_BUSY_S = 0.3


def _layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(
        nn.Sequential(nn.Linear(_WIDTH, _INNER, bias=False), nn.ReLU(), nn.Linear(_INNER, _WIDTH, bias=False))
        for _ in range(_LAYERS)
    ))  # fmt: skip


def _step(module: nn.Module) -> Callable[[], None]:
    rows = torch.randn(_ROWS, _WIDTH, requires_grad=True)
    return lambda: module(rows).square().mean().backward()


def _plainly() -> None:
    """Call each collective of ``torch.distributed`` once, with tensors of 100 and 200 floats."""
    small, large, other = torch.ones(100), torch.ones(200), 1 - distributed.get_rank()
    distributed.all_reduce(large)
    distributed.broadcast(small, 0)
    distributed.all_gather_into_tensor(large, small)
    distributed.all_gather([small.clone(), small.clone()], small)
    distributed.reduce_scatter_tensor(small, large)
    distributed.all_to_all_single(torch.empty_like(large), large)
    sending = distributed.P2POp(distributed.isend, torch.ones(50), other)
    receiving = distributed.P2POp(distributed.irecv, torch.empty(50), other)
    for work in distributed.batch_isend_irecv([sending, receiving]):
        work.wait()
    distributed.barrier()


def _counted() -> dict[str, dict[str, int]]:
    """Return what one rank hands to collectives in a steady step, by technique."""
    mesh = init_device_mesh("cpu", (2,))
    shared = DistributedDataParallel(_layers(), bucket_cap_mb=0.05)
    sharded = _layers()
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    split = _layers()
    for layer in split:
        parallelize_module(layer, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    steps: dict[str, Callable[[], None]] = {
        "ddp": _step(shared), "fsdp": _step(sharded), "tensor-parallel": _step(split), "plainly": _plainly,
    }  # fmt: skip
    found = {}
    for name, step in steps.items():
        for _ in range(3):  # DDP builds its buckets anew in the second step
            step()
        found[name] = communicated_bytes(step)[1]
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    first, second = on_ranks(_counted, tmp_path_factory.mktemp("ranks"))
    assert first == second
    return first


def test_ddp_reduces_the_bytes_of_its_gradients_once_a_step_though_cpp_calls_the_collective(
    counted: dict[str, dict[str, int]],
) -> None:
    assert counted["ddp"] == {"all_reduce": _WEIGHTS}


def test_fsdp_gathers_its_weights_forward_and_backward_and_scatters_its_gradients(
    counted: dict[str, dict[str, int]],
) -> None:
    assert counted["fsdp"] == {"all_gather": 2 * _WEIGHTS, "reduce_scatter": _WEIGHTS}


def test_tensor_parallel_reduces_a_layers_activations_once_forward_and_once_backward(
    counted: dict[str, dict[str, int]],
) -> None:
    assert counted["tensor-parallel"] == {"all_reduce": 2 * _LAYERS * _ACTIVATIONS}


def test_every_collective_counts_with_the_whole_tensor_that_it_works_on(counted: dict[str, dict[str, int]]) -> None:
    assert counted["plainly"] == {
        "all_reduce": 800, "broadcast": 400, "all_gather": 800 + 800, "reduce_scatter": 800, "all_to_all": 800,
        "send": 200, "recv": 200,
    }  # fmt: skip


def test_every_operation_of_torch_that_moves_a_payload_is_known_as_a_collective() -> None:
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(("c10d::", "_c10d_functional::"))
    }
    assert {name for name in names if collective_of(name) is None} <= {
        "barrier", "monitored_barrier_", "check_for_nan", "wait_tensor", "_wrap_tensor_autograd", "batch_p2p_ops",
    }  # fmt: skip


_SUITE = """
[suite]
name = "late"
[matrix]
model = ["untrained-tiny"]
technique = ["none"]
workload = ["short"]
device = ["cpu"]
[[include]]
model = "untrained-tiny"
technique = "ddp+late"
workload = "short"
device = "2xcpu"
[[exclude]]
technique = ["ddp", "late"]
[workload.short]
use = "train"
batch_size = 2
sequence_length = 32
[settings]
measured_steps = 3
evaluate_s = 0
"""
_PLUGINS = f"""
import dataclasses, time
from membench.plugins import Technique

class Late(Technique):
    '''The first rank computes for a while before its backward pass.'''

    def training_step(self, step, context):
        def backward(loss):
            until_s = time.thread_time() + {_BUSY_S}
            while context.ranks is not None and context.ranks.number == 0 and time.thread_time() < until_s:
                pass
            step.backward(loss)
        return dataclasses.replace(step, backward=backward)
"""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("late")
    (folder / "membench_plugins.py").write_text(_PLUGINS)
    (folder / "suite.toml").write_text(_SUITE)
    assert main(["run", str(folder / "suite.toml"), "--output", str(folder / "results")]) == 0
    return {record.id: record for record in read_run(newest_run(folder / "results")).records}


def test_a_record_says_what_each_rank_hands_to_each_collective(late: dict[str, Record]) -> None:
    record = late["untrained-tiny/ddp+late/short/2xcpu"]
    trained, frozen = record.metrics["trained_weights_bytes"], record.metrics["frozen_weights_bytes"]
    for process in record.processes:
        # DDP lets all ranks have the first one's buffers before each forward pass.
        assert process.communicated_bytes == {"all_reduce": trained, "broadcast": frozen}
    assert record.metrics["communicated_bytes"] == (trained or 0) + (frozen or 0)
    assert record.metrics["communicated_bytes"] == record.metrics["weights_bytes"]


def test_the_rank_that_waits_for_a_slower_one_sleeps_as_long_as_that_one_computes(late: dict[str, Record]) -> None:
    record = late["untrained-tiny/ddp+late/short/2xcpu"]
    slow, fast = record.processes
    assert fast.slept_s is not None
    assert slow.slept_s is not None
    for slept_s, duration_s in zip(fast.slept_s, fast.durations_s or (), strict=True):
        assert _BUSY_S * 0.9 < slept_s <= duration_s
    assert max(slow.slept_s) < min(fast.slept_s)
    assert record.obtained["communication_wait_percent"]["rank"] == 1
    assert record.obtained["communication_wait_percent"]["bound"] == "at most"
    expected = sum(fast.slept_s) / sum(fast.durations_s or ()) * 100
    assert record.metrics["communication_wait_percent"] == pytest.approx(expected, rel=0.2)


def test_a_case_without_ranks_says_nothing_of_communication(late: dict[str, Record]) -> None:
    record = late["untrained-tiny/none/short/cpu"]
    assert not {"communicated_bytes", "communication_wait_percent"} & {*record.metrics, *record.reasons}
    assert record.processes[0].phase("communication") is None
    assert record.processes[0].slept_s is None
