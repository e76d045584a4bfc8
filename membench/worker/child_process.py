"""Running a function in a forked process, so that none of its memory remains in the measured one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from membench import plugins
from membench.worker.waiting import wait_passively

_UNSUITABLE_EXIT_CODE = 3
"""The exit code of a preparing process if a technique cannot be applied to the case."""


def run_in_child(work: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Run a function in a forked process and return its result, which must be representable in JSON.

    Raises:
        RuntimeError: if the process fails; the message is its error.
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
            output = f"{type(error).__name__}: {error}".encode()[:4096]
            code = 1
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
    if code:
        raise RuntimeError(output.decode(errors="replace") or f"preparing the case ended with {code}")
    found: dict[str, list[Any]] = json.loads(output)
    return found
