"""Inside the measured process: does what the runner asks, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

from membench import plugins
from membench.errors import is_out_of_memory
from membench.protocol import requests
from membench.protocol.messages import Done, EndedBadly, Progress
from membench.protocol.requests import MeasureCase, MeasureFunction, PrepareModel, Request
from membench.worker import case as measured_case
from membench.worker import function
from membench.worker.assembly import create
from membench.worker.meter import Meter

_LONGEST_MESSAGE = 500


def main(request: Request, channel: socket.socket) -> None:
    """Do what ``request`` asks and say over ``channel`` how it ended."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this process that goes
    meter = Meter(channel, request.rank)
    try:
        match request.work:
            case PrepareModel():
                _prepare(request.work, meter)
            case MeasureFunction():
                function.measure(request.work, request.rank, meter)
            case MeasureCase():
                measured_case.measure(request.work, request.rank, Path(request.scratch), meter)
        meter.tell(Done())
    except plugins.Unsuitable as error:
        meter.tell(EndedBadly("skipped", str(error)))
    except plugins.DoesNotFit as error:
        meter.tell(EndedBadly("out-of-memory", str(error)))
    except measured_case.Diverged as error:
        meter.tell(EndedBadly("diverged", str(error), error.phase))
    except (Exception, SystemExit) as error:  # a plug-in must not end the process
        status = "out-of-memory" if is_out_of_memory(error) else "failed"
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        meter.tell(EndedBadly(status, said[:_LONGEST_MESSAGE]))
        raise


def _prepare(asked: PrepareModel, meter: Meter) -> None:
    model = create("model", asked.model)
    model.prepare(lambda done, total, what: meter.tell(Progress(done, total, what)))


if __name__ == "__main__":
    main(requests.decode_json(sys.stdin.buffer.read()), socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
