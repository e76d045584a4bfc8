"""The entry point of a worker: executes the runner's request and reports the outcome."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import types
from pathlib import Path

from membench import plugins
from membench.errors import summary_with_causes
from membench.host import import_path
from membench.host.out_of_memory import is_out_of_memory
from membench.protocol import pickling, requests
from membench.protocol.job import ASKS_WHERE
from membench.protocol.messages import AsksForEstimate, Done, EndedBadly, OptionsRefused, Progress
from membench.protocol.requests import EstimateCase, MeasureCase, MeasureFunction, PrepareModel, Request, VerifyModels
from membench.worker import case as measured_case
from membench.worker import function
from membench.worker.assembly import create
from membench.worker.fitting import NearMemory
from membench.worker.meter import Meter
from membench.worker.waiting import wait_passively

_LONGEST_MESSAGE = 500


def main(request: Request, channel: socket.socket) -> None:
    """Execute a request, and report the outcome over the channel.

    Raises:
        Exception: whatever the request fails with, after it was reported, so that the process ends with a traceback.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, the kernel kills this process first
    _prepare_for_children()
    if request.rank.is_one_of_several:
        faulthandler.register(signal.Signals[ASKS_WHERE], all_threads=False)
    meter = Meter(channel, request.rank)
    try:
        match request.work:
            case VerifyModels():
                _verify(request.work, meter)
            case PrepareModel():
                _prepare(request.work, meter)
            case MeasureFunction():
                function.measure(request.work, request.rank, meter)
            case MeasureCase():
                measured_case.measure(request.work, request.rank, Path(request.scratch), meter)
            case EstimateCase():
                _estimate(request.work, Path(request.scratch), meter)
        meter.send(Done())
    except plugins.Unsuitable as error:
        meter.send(EndedBadly("skipped", str(error), meter.current_phase))
    except (plugins.WrongOutput, plugins.NotInModel) as error:
        meter.send(EndedBadly("failed", str(error), meter.current_phase))
    except NearMemory as near:  # it is not done, so that other ranks do not wait for it
        meter.send(AsksForEstimate(near.free_bytes, near.where))
    except plugins.DoesNotFit as error:
        meter.send(EndedBadly("out-of-memory", str(error), meter.current_phase))
    except measured_case.Diverged as error:
        meter.send(EndedBadly("diverged", str(error), error.phase))
    except (Exception, SystemExit) as error:  # a plug-in must not end the process
        status = "out-of-memory" if is_out_of_memory(error) else "failed"
        meter.send(EndedBadly(status, summary_with_causes(error)[:_LONGEST_MESSAGE], meter.current_phase))
        raise


def _verify(work: VerifyModels, meter: Meter) -> None:
    for name, model in work.models.items():
        # One that cannot be verified fails when it is measured.
        with contextlib.suppress(Exception):
            if (problem := create("model", model).verify()) is not None:
                meter.send(OptionsRefused(name, str(problem)[:_LONGEST_MESSAGE]))


def _prepare_for_children() -> None:
    """Let processes that plug-ins and functions spawn find their functions, and import nothing of membench's."""
    # A spawned process imports the main module of its parent; what runs here is nobody's program.
    sys.modules["__main__"] = types.ModuleType("__main__")
    pickling.let_children_find_functions()


def _prepare(work: PrepareModel, meter: Meter) -> None:
    model = create("model", work.model)
    wait_passively()
    model.prepare(lambda done, total, what: meter.send(Progress(done, total, what)))


def _estimate(work: EstimateCase, scratch: Path, meter: Meter) -> None:
    from membench.worker.tracing import estimate  # it needs parts of torch that no measured case should import

    estimate.estimate(work, scratch, meter)


if __name__ == "__main__":
    import_path.add_current_folder()
    main(requests.decode_json(sys.stdin.buffer.read()), socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
