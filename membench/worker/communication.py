"""What the ranks of a case say to each other in a step: bytes by collective, and the time that is spent waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from membench.host.thread_time import ThreadTime

_T = TypeVar("_T")

_COLLECTIVES = {
    "all_reduce": "all_reduce", "allreduce": "all_reduce",
    "all_gather": "all_gather", "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all", "alltoall": "all_to_all",
    "broadcast": "broadcast", "reduce": "reduce", "gather": "gather", "scatter": "scatter",
    "send": "send", "isend": "send", "recv": "recv", "irecv": "recv",
}  # fmt: skip
"""The collective of an operation, by how its name begins, the longer names first: c10d and its functional form differ.

What is not named here moves no payload: barriers, and waiting for a collective that has begun."""


def collective_of(operation: str) -> str | None:
    """Return which collective an operation of c10d is; ``None`` if it hands no payload to one."""
    name = operation.lstrip("_")
    return next((collective for begin, collective in _COLLECTIVES.items() if name.startswith(begin)), None)


def communicated_bytes(step: Callable[[], _T], *, after_another: bool = False) -> tuple[_T, dict[str, int]]:
    """Run a step and count what this rank hands to collectives, whoever calls them: Python or torch's own C++.

    A collective counts with the whole tensor that it works on, the larger of what goes in and what comes out on this
    rank: the tensor of an all-reduce, a broadcast, a send or a receive; what an all-gather returns; what a
    reduce-scatter takes. What travels over a wire follows from that and the backend's algorithm.

    Args:
        after_another: take another step first, because FSDP keeps some weights gathered from one forward pass to the
            next, and they were freed to be counted.

    Returns:
        what the step returns, and the bytes by collective.

    Source: operations ``c10d::*`` and ``_c10d_functional::*``, as torch dispatches them.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, int] = {}
    plain = torch.Tensor.__torch_dispatch__

    class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True  # else compiled functions run uncompiled, and fail where they must not

        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
        ) -> Any:
            is_ours = function.namespace in ("c10d", "_c10d_functional")
            if not is_ours and any(kind.__torch_dispatch__ != plain for kind in types):
                return NotImplemented  # a DTensor's own dispatch calls collectives, which are seen then
            returned = function(*arguments, **(options or {}))
            if is_ours and (collective := collective_of(function._opname)) is not None:
                # The first two are what comes out and what goes in, or the functional form's input and its group.
                sizes = (*map(_bytes, arguments[:2]), _bytes(returned))
                found[collective] = found.get(collective, 0) + max(sizes)
            return returned

    if after_another:
        step()
    with Operations():  # type: ignore[no-untyped-call]
        returned = step()
    return returned, found


def _bytes(values: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(values))


def _tensors(values: Any) -> Iterator[Any]:
    import torch

    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class Sleeping:
    """Counts for how long the thread of a step sleeps, which it does where it waits for other ranks.

    It sees all waiting, that of torch's own C++ too, and takes none of the step's time. What a thread sleeps for
    besides, such as other threads of its team that wait passively, is included. Collectives on a GPU wait there, and
    not in a thread: then nothing is known.
    """

    def __init__(self) -> None:
        self.slept_s: list[float] | None = []

    def watched(self, step: Callable[[], _T]) -> Callable[[], _T]:
        """Return the step, each call of which is counted."""

        def counted() -> _T:
            before = ThreadTime.now()
            returned = step()
            after = ThreadTime.now()
            if before is None or after is None:
                self.slept_s = None
            elif self.slept_s is not None:
                self.slept_s.append(before.slept_s(after))
            return returned

        return counted
