"""The launcher of programs: a bare interpreter that starts a user's program, reports its own size, and ends.

The kernel's peak of a program includes what the process took that it was forked from. The fork server takes more than
many programs do, and far more when it has imported torch; this interpreter takes less than any program in Python. It
runs by its path, without ``site``, and imports nothing else of membench.

The program becomes a child of the fork server, which adopts orphans, when this process has ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_CANNOT_BE_STARTED = 127  # the exit code that shells use for a command that was not found
_GROWTH_BYTES = 2**19
"""What starting a program may still add to the peak, and what the kernel's counters may leave out of it."""


def launch(answers: int, channel: tuple[str, str], command: list[str]) -> None:
    """Start a program in a child process and return in this one.

    Args:
        answers: a descriptor that gets the program's id, the time of its start by the monotonic clock, and an upper
            bound in bytes of what this process adds to its peak. It closes when the program begins.
        channel: the environment variable of the channel for marks of phases, and the channel's descriptor.
        command: the program and its arguments; they get the other descriptors that this process inherited.
    """
    launcher = os.getpid()
    if os.fork():
        return
    try:
        os.set_inheritable(answers, False)
        while os.getppid() == launcher:  # the signal below is sent when the parent of this moment ends
            os.sched_yield()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        variable, descriptor = channel
        os.environ[variable] = f"{os.getpid()}:{descriptor}"
        with open("/proc/self/status") as status:
            peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        os.write(answers, f"{os.getpid()} {time.monotonic()} {peak_kib * 1024 + _GROWTH_BYTES}".encode())
        os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(_CANNOT_BE_STARTED)


if __name__ == "__main__":
    launch(int(sys.argv[1]), (sys.argv[2], sys.argv[3]), sys.argv[4:])
    os._exit(0)
