"""Running a function in a forked process, so that none of its memory remains in the measured one."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from membench import plugins
from membench.errors import summary_with_causes
from membench.host import procfs
from membench.host.out_of_memory import is_out_of_memory
from membench.worker.waiting import wait_passively

_REFUSED_BY_EXIT_CODE: Mapping[int, type[Exception]] = {
    3: plugins.Unsuitable,
    4: plugins.DoesNotFit,
    5: MemoryError,
    6: plugins.NotInModel,
}
"""The exit codes of a preparing process if a technique cannot be applied to the case, or memory does not suffice."""


def _use_threads() -> None:
    """Let torch use the case's threads; the forking process has it use one, because threads do not survive a fork."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(threads))


def run_in_child(work: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Run a function in a forked process and return its result, which must be representable in JSON.

    Raises:
        RuntimeError: if the process fails; the message is its error.
        MemoryError: if memory runs out in the process, or the kernel kills it for lack of that.
        plugins.Unsuitable: if ``work`` raises it.
        plugins.DoesNotFit: if ``work`` raises it.
        plugins.NotInModel: if ``work`` raises it.
    """
    oom_kills_before = procfs.oom_kills()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        output, code = b"", 0
        try:
            os.close(read_end)
            wait_passively()
            _use_threads()
            output = json.dumps(work()).encode()
        except BaseException as error:
            code = next((code for code, kind in _REFUSED_BY_EXIT_CODE.items() if isinstance(error, kind)), 1)
            output = (str(error) if code in (3, 4, 6) else summary_with_causes(error)).encode()[:4096]
            if code == 1 and is_out_of_memory(error):
                code = 5
        finally:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(output)
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        output = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in _REFUSED_BY_EXIT_CODE:
        raise _REFUSED_BY_EXIT_CODE[code](output.decode(errors="replace"))
    if code == -signal.SIGKILL and oom_kills_before is not None and procfs.oom_kills() != oom_kills_before:
        raise MemoryError("preparing the case was killed by the kernel for lack of memory")
    if code:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise RuntimeError(output.decode(errors="replace") or f"the process that prepared the case {ended}")
    found: dict[str, list[Any]] = json.loads(output)
    return found
