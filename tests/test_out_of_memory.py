"""What means that memory ran out, and what only has the words: errors, and the output of programs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from membench.errors import summary, summary_with_causes
from membench.host import last_words
from membench.host.out_of_memory import is_out_of_memory
from membench.running import program_ending
from membench.worker.child_process import run_in_child


class OutOfMemoryError(RuntimeError):
    """As torch has one."""


class Odd(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def _raised(raise_it: Callable[[], object]) -> BaseException:
    try:
        raise_it()
    except BaseException as error:
        return error
    raise AssertionError


def _from_memory() -> None:
    try:
        raise MemoryError("no room")
    except MemoryError as error:
        raise RuntimeError("could not load") from error


def _in_a_handler() -> None:
    try:
        raise MemoryError("no room")
    except MemoryError:
        raise ValueError("no size is smaller")  # noqa: B904


_TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n'
_OF_MEMORY = [
    MemoryError(),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("\n=====\nCUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 80 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("Caught OutOfMemoryError in replica 0 on device 0.\nOriginal Traceback (most recent call last):"),
    _raised(_from_memory),
    ExceptionGroup("several", [ValueError("x"), ExceptionGroup("more", [MemoryError()])]),
    subprocess.CalledProcessError(1, "train", stderr=f"{_TRACEBACK}MemoryError: no room\n".encode()),
    SystemExit("[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
]  # fmt: skip
_OF_OTHERS = [
    ValueError("the words 'CUDA out of memory' are no name"),
    KeyError("MemoryError"),
    AssertionError("test_cuda_out_of_memory: CUDA out of memory expected"),
    RuntimeError("RESOURCE_EXHAUSTED: Received message larger than max"),
    OSError(errno.ENOSPC, "No space left on device"),
    ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
    OSError("libgomp.so.1: cannot allocate memory in static TLS block"),
    RuntimeError("expected 'CUDA out of memory'"),
    subprocess.CalledProcessError(1, "train", stderr=b"MemoryError\nValueError: later\n"),
    SystemExit(3),
    Odd(),
    _raised(_in_a_handler),
]


@pytest.mark.parametrize("error", _OF_MEMORY, ids=repr)
def test_an_error_means_that_memory_ran_out(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", _OF_OTHERS, ids=lambda error: type(error).__name__)
def test_an_error_only_has_the_words(error: BaseException) -> None:
    assert not is_out_of_memory(error)


_TORCHRUN = """\
E1130 10:00:00.000000 123 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: 1) local_rank: 0
Traceback (most recent call last):
  File "/usr/bin/torchrun", line 8, in <module>
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-30_10:00:00
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 123)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""
_OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
_RANKS = f"""\
[rank1]: Traceback (most recent call last):
[rank1]:   File "train.py", line 9, in <module>
[rank1]: {_OOM}
[rank0]: Traceback (most recent call last):
[rank0]:   File "train.py", line 9, in <module>
[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5
"""
_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"
_DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"
_GROUP = """\
  + Exception Group Traceback (most recent call last):
  |   File "x.py", line 1, in <module>
  | ExceptionGroup: several (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | {first}
    +---------------- 2 ----------------
    | ValueError: x
    +------------------------------------
"""

_OUTPUTS_OF_MEMORY = {
    f"{_OOM}\n{'=' * 60}\n": _OOM,
    f"{_TRACEBACK}{_OOM}\n{_TORCHRUN}": _OOM,
    f"{_RANKS}{_TORCHRUN}": _OOM,
    f"loader: error: no cache yet\n{_RANKS}{_TORCHRUN}": _OOM,
    f"\x1b[31m{_TRACEBACK}MemoryError: no room\x1b[0m\nwandb: synced\n": "MemoryError: no room",
    f"{_TRACEBACK}MemoryError\nmake: *** [train] Error 1\n": "MemoryError",
    f"{_TRACEBACK}MemoryError: a{_CAUSED}{_TRACEBACK}own.Failed: b\n": "own.Failed: b (caused by MemoryError: a)",
    _GROUP.format(first="MemoryError: a"): "MemoryError: a",
    "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n": (
        "terminate called after throwing an instance of 'std::bad_alloc'"
    ),
    "sh: 1: fork: Cannot allocate memory\n": "sh: 1: fork: Cannot allocate memory",
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an array\n": (
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an array"
    ),
    f"{_TRACEBACK}RuntimeError: \n====\nCUDA out of memory. Tried to allocate 2 GiB\n====\n": (
        "CUDA out of memory. Tried to allocate 2 GiB"
    ),
}
_OUTPUTS_OF_OTHERS = {
    "": "",
    "first\nlast\n=====\n": "last",
    f"{_TRACEBACK}{_OOM}\nretrying with batch 4\n{_TRACEBACK}ValueError: bad\n": "ValueError: bad",
    f"{_TRACEBACK}{_OOM}\nretrying with batch 4\nno batch is small enough\n": "no batch is small enough",
    f"{_TRACEBACK}MemoryError: a{_DURING}{_TRACEBACK}own.Failed: b\n": "own.Failed: b",
    f"WARNING caught {_OOM}\nvalidation failed\n": "validation failed",
    "FAILED tests/test_x.py::test_cuda_out_of_memory - AssertionError: assert 1 == 2\n": (
        "FAILED tests/test_x.py::test_cuda_out_of_memory - AssertionError: assert 1 == 2"
    ),
    f"{_TRACEBACK}ValueError: 'MemoryError: x' is no key\n": "ValueError: 'MemoryError: x' is no key",
    f"{_OOM}\ntrain.py: error: the following arguments are required: --data\n": (
        "train.py: error: the following arguments are required: --data"
    ),
    f"{_TRACEBACK}ValueError: bad\n{_TORCHRUN}": "ValueError: bad",
    f"[rank0]: {_OOM}\n{_TRACEBACK}ValueError: bad\n": "ValueError: bad",
    _GROUP.format(first="KeyError: a"): "ValueError: x",
    f"{_TRACEBACK}ImportError: libgomp.so.1: cannot allocate memory in static TLS block\n": (
        "ImportError: libgomp.so.1: cannot allocate memory in static TLS block"
    ),
}


@pytest.mark.parametrize("text", _OUTPUTS_OF_MEMORY)
def test_an_output_ends_for_lack_of_memory(text: str) -> None:
    assert last_words.of(text) == last_words.LastWords(_OUTPUTS_OF_MEMORY[text], True)


@pytest.mark.parametrize("text", _OUTPUTS_OF_OTHERS)
def test_an_output_ends_for_another_reason(text: str) -> None:
    assert last_words.of(text) == last_words.LastWords(_OUTPUTS_OF_OTHERS[text], False)


@pytest.mark.parametrize(
    "piece",
    ["OS", "| aError\n", f"{_TRACEBACK}E{_CAUSED}", "x: \n", "\n", "a.", "[rank1]: x\n", "MemoryError: a\n retrying\n"],
)
def test_any_output_is_looked_at_in_a_short_time(piece: str) -> None:
    began_s = time.process_time()
    last_words.of(piece * (65536 // len(piece)))
    assert time.process_time() - began_s < 3


def test_an_error_is_one_line_with_what_it_was_caused_by() -> None:
    assert summary(RuntimeError("\n=====\n  first words\nmore")) == "RuntimeError: first words"
    assert summary(Odd()) == "Odd"
    assert summary_with_causes(_raised(_from_memory)) == (
        "RuntimeError: could not load (caused by MemoryError: no room)"
    )
    assert summary_with_causes(_raised(_in_a_handler)) == (
        "ValueError: no size is smaller (while handling MemoryError: no room)"
    )
    group = ExceptionGroup("several", [ValueError("x"), KeyError("y")])
    assert summary_with_causes(group) == "ExceptionGroup: several (2 sub-exceptions): ValueError: x; KeyError: 'y'"


@pytest.mark.parametrize(
    ("code", "text", "kernel_killed", "status"),
    [
        (1, "  exitcode  : -9 (pid: 123)\n", True, "out-of-memory"),
        (
            1,
            "E1130 api.py:882] failed (exitcode: -9) local_rank: 0 (pid: 12) of binary: python\n",
            True,
            "out-of-memory",
        ),
        (1, "RuntimeError: DataLoader worker (pid 12) is killed by signal: Killed.\n", True, "out-of-memory"),
        (137, "Killed\n", True, "out-of-memory"),
        (137, "Killed\n", False, "failed"),
        (1, "  exitcode  : -9 (pid: 123)\n", False, "failed"),
        (1, "ValueError: bad\n", True, "failed"),
    ],
)
def test_a_process_that_the_kernel_killed_below_a_launcher_is_out_of_memory(
    code: int, text: str, kernel_killed: bool, status: str
) -> None:
    words = last_words.of(text)
    found = program_ending.outcome(code << 8, words, text, kernel_killed=kernel_killed)
    assert found is not None
    assert found[0] == status


def test_memory_that_runs_out_in_a_preparing_process_runs_out_in_the_case() -> None:
    def runs_out() -> dict[str, list[Any]]:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fails() -> dict[str, list[Any]]:
        raise ValueError("bad") from KeyError("key")

    def is_killed() -> dict[str, list[Any]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(MemoryError, match=r"^OutOfMemoryError: CUDA out of memory"):
        run_in_child(runs_out)
    with pytest.raises(RuntimeError, match=r"^ValueError: bad \(caused by KeyError: 'key'\)$"):
        run_in_child(fails)
    with pytest.raises(RuntimeError) as killed:
        run_in_child(is_killed)
    assert last_words.tell_of_a_kill(str(killed.value))
    assert last_words.are_of_another(str(killed.value))
