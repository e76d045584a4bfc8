"""What techniques for training data share, and how the data are read."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from membench.plugins import Context, Setting, Technique
from membench.plugins.storage import Storage


class DataTechnique(Technique):
    """About training data: it needs a workload that reads some."""

    acts_on: ClassVar[str] = "data"

    def refuse(self, setting: Setting) -> str | None:
        if setting.workload.corpus() is None:
            return (
                "it is about training data, and this workload reads none: use read-data, or train with data = 'topics'"
            )
        return None


class Stream(DataTechnique):
    """Data decoded a few blocks at a time, while training goes on, instead of all at the start.

    At most four blocks of 1,048,576 tokens are decoded at once: the two that batches come from, and the next two, which
    a thread begins with meanwhile. However much data there are, memory stays the same.
    """

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        return dataclasses.replace(storage, reading="stream")
