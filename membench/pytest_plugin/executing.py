"""Where the jobs of a pytest run are measured."""

from __future__ import annotations

import pytest

from membench.pytest_plugin.sharing import Sharing
from membench.running.executors.executor import Executor
from membench.running.executors.local import LocalExecutor
from membench.running.needs import Needs
from membench.running.session import silent


def opened(config: pytest.Config, needs: Needs) -> Executor:
    """An executor on this machine, which takes turns with those of xdist's other workers."""
    return LocalExecutor(needs, silent, Sharing.of(config).turn())
