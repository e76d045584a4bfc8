"""The executor of a pytest run."""

from __future__ import annotations

import pytest

from membench.pytest_plugin.sharing import Sharing
from membench.running.executors.executor import Executor
from membench.running.executors.local import LocalExecutor
from membench.running.needs import Needs
from membench.running.session import silent


def open_executor(config: pytest.Config, needs: Needs) -> Executor:
    """Open an executor on this machine that is coordinated with those of other workers of xdist."""
    return LocalExecutor(needs, silent, Sharing.of(config).turn()).__enter__()
