"""The logits of reference cases, kept for the cases of their group that are compared with them."""

from __future__ import annotations

from pathlib import Path

from membench.protocol.case import REFERENCE, Case
from membench.protocol.requests import ReferenceLogits


class References:
    """A folder of logits, a file a group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, case: Case) -> ReferenceLogits:
        """Where a case finds the logits of its group's reference, or leaves its own if it is that."""
        model, workload, device = case.group
        # A colon has no place in names of files on every disk; '@' and ',' have none in the names of plug-ins.
        name = ",".join((model.replace(":", "@"), workload.replace(":", "@"), device.replace(":", "")))
        return ReferenceLogits(str(self._folder / f"{name}.npy"), case.technique == REFERENCE)
