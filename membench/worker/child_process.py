"""Running a function in a forked process, so that none of its memory remains in the measured one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from membench import plugins
from membench.errors import summary_with_causes
from membench.host.out_of_memory import is_out_of_memory
from membench.worker.waiting import wait_passively

_UNSUITABLE_EXIT_CODE, _OUT_OF_MEMORY_EXIT_CODE = 3, 4
"""The exit codes of a preparing process if a technique cannot be applied to the case, and if memory runs out."""


def run_in_child(work: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Run a function in a forked process and return its result, which must be representable in JSON.

    Raises:
        RuntimeError: if the process fails; the message is its error.
        MemoryError: if memory runs out in the process.
        plugins.Unsuitable: if ``work`` raises it.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        output, code = b"", 0
        try:
            os.close(read_end)
            wait_passively()
            output = json.dumps(work()).encode()
        except plugins.Unsuitable as error:
            output, code = str(error).encode()[:4096], _UNSUITABLE_EXIT_CODE
        except BaseException as error:
            output = summary_with_causes(error).encode()[:4096]
            code = _OUT_OF_MEMORY_EXIT_CODE if is_out_of_memory(error) else 1
        finally:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(output)
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        output = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == _UNSUITABLE_EXIT_CODE:
        raise plugins.Unsuitable(output.decode(errors="replace"))
    if code == _OUT_OF_MEMORY_EXIT_CODE:
        raise MemoryError(output.decode(errors="replace"))
    if code:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise RuntimeError(output.decode(errors="replace") or f"the process that prepared the case {ended}")
    found: dict[str, list[Any]] = json.loads(output)
    return found
