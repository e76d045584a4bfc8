"""Storage of reference logits for the cases that are compared with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from membench.protocol.case import REFERENCE, Case
from membench.protocol.requests import ReferenceLogits


def references(path: Path) -> Path:
    """Return the folder for the reference logits of a run, by the path of its file."""
    return path.with_suffix(".references")


def remove(path: Path) -> None:
    """Remove the reference logits of a run that is done with them, if there are any."""
    shutil.rmtree(references(path), ignore_errors=True)


class References:
    """A folder of logits with one file per reference."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, case: Case) -> bool:
        """Return whether the logits of a case's reference are there."""
        return Path(self.of(case).path).exists()

    def of(self, case: Case) -> ReferenceLogits:
        """Return the file of the logits of a case's reference, and whether the case itself writes it."""
        model, workload, device = case.reference_group
        # Some file systems allow no colon in file names; '@' and ',' do not occur in the names of plug-ins.
        name = ",".join((model.replace(":", "@"), workload.replace(":", "@"), device.replace(":", "")))
        return ReferenceLogits(str(self._folder / f"{name}.npy"), case.technique == REFERENCE)
