"""A world of ranks of which one exists: its collectives return at once."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from membench.plugins import Ranks, Technique, Unsuitable
from membench.plugins.parallel import degrees
from membench.plugins.ranks import DIMENSIONS
from membench.worker.tracing.ledger import Ledger


@contextlib.contextmanager
def fake_ranks(techniques: Sequence[Technique], number: int, of: int, shared: Path, ledger: Ledger) -> Iterator[Ranks]:
    """Be one of so many ranks; not within a ``FakeTensorMode``, since meshes compute with ranks' numbers.

    Args:
        shared: the folder that all ranks share.
        ledger: counts what the rank's tensors take.

    Source: torch's backend ``fake``, as torchtitan's estimates use it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = degrees(techniques, of)
    names = tuple(dimension for dimension in DIMENSIONS if dimension in found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.init_process_group("fake", store=FakeStore(), rank=number, world_size=of)
        mesh = init_device_mesh("cpu", tuple(found[name] for name in names), mesh_dim_names=names)
    try:
        with _meshes_of_real_numbers(), _wrapping_of_fake_tensors(), _shapes_uncounted(ledger):
            yield Ranks(number, of, mesh, shared)
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _meshes_of_real_numbers() -> Iterator[None]:
    """Let meshes be cut and joined while fake tensors are in use: they compute with the numbers of ranks."""
    kind: Any = DeviceMesh
    cut, join = kind.__getitem__, getattr(kind, "_concatenate", None)

    def cut_real(self: DeviceMesh, names: Any) -> DeviceMesh:
        with unset_fake_temporarily():
            made: DeviceMesh = cut(self, names)
            return made

    def join_real(meshes: list[DeviceMesh]) -> DeviceMesh:
        assert join is not None
        with unset_fake_temporarily():
            made: DeviceMesh = join(meshes)
            return made

    kind.__getitem__ = cut_real
    if join is not None:
        kind._concatenate = staticmethod(join_real)
    try:
        yield
    finally:
        kind.__getitem__ = cut
        if join is not None:
            kind._concatenate = staticmethod(join)


@contextlib.contextmanager
def _shapes_uncounted(ledger: Ledger) -> Iterator[None]:
    """Leave out the tensors with which a ``DTensor`` finds the shape of a result: in a measured process these are fake.

    They are as large as the tensors of all ranks together. torch enters a context around that, to have a place for a
    lock.
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    propagator: Any = ShardingPropagator
    before = propagator._fake_mode_lock
    propagator._fake_mode_lock = _Aside(ledger)
    try:
        yield
    finally:
        propagator._fake_mode_lock = before


class _Aside:
    """A context that can be entered again and again."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self._ledger.aside())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


@contextlib.contextmanager
def _wrapping_of_fake_tensors() -> Iterator[None]:
    """Let DDP wrap fake tensors: it exchanges the shapes of parameters by their addresses, which these have not.

    Its buckets are reduced by a hook that is done at once, because a fake collective gives no result, and are not
    rebuilt.
    """
    import torch.nn.parallel.distributed

    wrapping: Any = torch.nn.parallel.distributed
    original = wrapping._verify_param_shape_across_processes
    wrapper: Any = wrapping.DistributedDataParallel
    make, register = wrapper.__init__, wrapper.register_comm_hook

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self.reducer = _WithoutRebuilding(self.reducer)
        register(self, None, lambda _, bucket: _reduced(bucket))  # DDP wants no names of types in it

    def refuse(*_: Any) -> None:
        raise Unsuitable("it cannot be estimated: a hook of DDP works on values that the other ranks send")

    wrapping._verify_param_shape_across_processes = lambda *_, **__: True
    wrapper.__init__, wrapper.register_comm_hook = made, refuse
    try:
        yield
    finally:
        wrapping._verify_param_shape_across_processes = original
        wrapper.__init__, wrapper.register_comm_hook = make, register


class _WithoutRebuilding:
    """DDP's reducer, which does not sort its buckets anew after the first step: their order is agreed on by values.

    Their bytes are the same in any order.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _reduced(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def alike(techniques: Sequence[Technique], of: int) -> list[list[int]]:
    """Return the numbers of all ranks, those that are alike together: the ranks of each stage of a pipeline.

    Ranks along other dimensions have equal shares. Of what does not divide evenly the last ones have less, and are
    taken to be as the first.
    """
    found = degrees(techniques, of)
    inner = math.prod(found.get(dimension, 1) for dimension in DIMENSIONS[DIMENSIONS.index("stage") + 1 :])
    stages = found.get("stage", 1)
    return [[rank for rank in range(of) if rank // inner % stages == stage] for stage in range(stages)]
