"""pyarrow, with the allocator that memory is measured under."""

from __future__ import annotations

import os
from typing import Any


def pyarrow() -> Any:
    """pyarrow with its modules for Parquet and IPC files.

    Its own allocator keeps some MiB of what is given back, which would count as live. It reads which one it is to use
    when it is imported, so it is not among what the fork server imports.

    Raises:
        ImportError: if it is not installed.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.ipc  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    return pyarrow
