"""Exceptions of measured functions, raised in the tests that measure them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from membench.errors import MembenchError
from membench.protocol import exceptions

_RAISED = pytest.StashKey[list[tuple[BaseException, str]]]()


def loaded(path: Path, item: pytest.Item) -> BaseException:
    """Return the exception that a function of a test raised in its process."""
    raised: exceptions.Raised = pickle.loads(path.read_bytes())
    try:
        error = exceptions.put_together(raised.error)
    except Exception:  # what it is made of does not go together here
        error = MembenchError(raised.traceback.strip().rpartition("\n")[2])
    item.stash.setdefault(_RAISED, []).append((error, raised.traceback))
    return error


def explain(item: pytest.Item, failure: BaseException) -> None:
    """Add the traceback in the measured process to an exception that fails a test.

    It is no note from the beginning, because ``pytest.raises(match=...)`` looks at notes, too.
    """
    for error, traceback in item.stash.get(_RAISED, []):
        if error in (failure, failure.__cause__, failure.__context__):
            error.add_note(f"\nin the measured process:\n{traceback.rstrip()}")
