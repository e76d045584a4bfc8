"""A clean process that has imported what cases need and forks one worker at a time.

It speaks JSON lines over the socket on its standard input. It watches that socket: when the runner dies, however it
dies, the worker and all its descendants are killed and the scratch folder is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback

from membench import allocator, procfs

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent() -> None:
    """Be killed when the parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill_descendants() -> None:
    for _ in range(10):
        descendants = procfs.children(os.getpid())
        if not descendants:
            return
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        select.select([], [], [], 0.01)


def _fork_worker(request: dict[str, object], pipe: int, output: int, server: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        die_with_parent()
        server.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from membench import worker

        worker.main(request, socket.socket(fileno=os.dup(pipe)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _spawn_worker(request: dict[str, object], pipe: int, output: int) -> int:
    arguments = [sys.executable, "-m", "membench.worker", json.dumps(request), str(pipe)]
    process = subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[pipe], preexec_fn=die_with_parent
    )
    process.returncode = 0  # reaped below, not by subprocess
    return process.pid


def serve(preload: list[str]) -> None:
    """Import ``preload``, then serve requests until the runner closes the socket."""
    server = socket.socket(fileno=os.dup(0))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    errors = {}
    for name in preload:
        try:
            importlib.import_module(name)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    allocator.settle()
    gc.freeze()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    scratch = tempfile.mkdtemp(prefix="membench-")
    server.sendall(json.dumps({"ready": True, "errors": errors, "scratch": scratch}).encode() + b"\n")
    worker = 0
    try:
        while True:
            ready, _, _ = select.select([server.fileno(), wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, 4096)
                with contextlib.suppress(ChildProcessError):
                    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                        if ended[0] == worker:
                            worker = 0
                            _kill_descendants()
                            shutil.rmtree(scratch, ignore_errors=True)
                            os.makedirs(scratch, exist_ok=True)
                            server.sendall(json.dumps({"exited": ended[1]}).encode() + b"\n")
            if server.fileno() in ready:
                data, descriptors, _, _ = socket.recv_fds(server, 2**20, 2)
                if not data:
                    return
                request = json.loads(data)
                if request.get("kill"):
                    _kill_descendants_of_worker(worker)
                    continue
                request["scratch"] = scratch
                pipe, output = descriptors
                if request["isolation"] == "spawn":
                    worker = _spawn_worker(request, pipe, output)
                else:
                    worker = _fork_worker(request, pipe, output, server)
                os.close(pipe)
                os.close(output)
                server.sendall(json.dumps({"pid": worker}).encode() + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        _kill_descendants()
        shutil.rmtree(scratch, ignore_errors=True)


def _kill_descendants_of_worker(worker: int) -> None:
    for pid in [*procfs.children(worker), worker] if worker else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1:])
