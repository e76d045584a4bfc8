"""The environment variables of a script's ranks, as ``torchrun`` sets them on one machine."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from typing import NamedTuple

ONE_THREAD = "OMP_NUM_THREADS is 1 for each rank, as torchrun sets it where it is not set"
_THREADS, _ADDRESS = "OMP_NUM_THREADS", "127.0.0.1"


class Meeting(NamedTuple):
    """Where the ranks of a script meet: a port that rank 0 opens, and an id of the run, the same for all."""

    port: int
    run_id: str

    @classmethod
    def new(cls) -> Meeting:
        """Return a meeting at a port on which nothing listens now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return cls(probe.getsockname()[1], str(uuid.uuid4()))


def uses_one_thread(of: int) -> bool:
    """Whether each of several ranks is to compute on one thread, since the user has set no number."""
    return of > 1 and _THREADS not in os.environ


def variables(number: int, of: int, meeting: Meeting) -> Mapping[str, str]:
    """Return what ``torchrun --nproc-per-node`` sets for one rank of its only node.

    No agent holds the store where ranks meet (``TORCHELASTIC_USE_AGENT_STORE``): rank 0 opens it at the port.

    Args:
        number: the rank.
        of: how many ranks there are.
        meeting: where they meet.

    Source: ``torch.distributed.elastic.agent.server.local_elastic_agent`` and ``torch.distributed.run``.
    """
    threads = {_THREADS: "1"} if uses_one_thread(of) else {}
    return threads | {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(number),
        "ROLE_NAME": "default",
        "WORLD_SIZE": str(of),
        "LOCAL_WORLD_SIZE": str(of),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(of),
        "MASTER_ADDR": _ADDRESS,
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": meeting.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
