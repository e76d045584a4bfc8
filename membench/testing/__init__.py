"""What the author of a plug-in needs in tests. Nothing here measures; importing it imports neither torch nor pytest.

A test class inherits a conformance class and names the plug-in::

    class TestHalf(membench.testing.TechniqueConformance):
        technique = Half
        options = {"dtype": "bfloat16"}

pytest then runs a test for each point of the contract. ``FakeWorker`` goes through a case's stages in the process of
the test, ``context`` is what a stage is called with, ``Tiny`` and ``tiny_module`` are a model of no size to call it on,
``hold`` and ``burst`` allocate known amounts, and ``Ballast`` and ``Burst`` do so as a model and a workload.
"""

from __future__ import annotations

from membench.builtin.known_amounts import Ballast, Burst
from membench.testing.fake_worker import FakeWorker, context
from membench.testing.known_sizes import burst, hold
from membench.testing.metric_conformance import MetricConformance
from membench.testing.model_conformance import ModelConformance
from membench.testing.technique_conformance import TechniqueConformance
from membench.testing.tiny import Tiny, tiny_module, tiny_transformer
from membench.testing.workload_conformance import WorkloadConformance

__all__ = [
    "Ballast",
    "Burst",
    "FakeWorker",
    "MetricConformance",
    "ModelConformance",
    "TechniqueConformance",
    "Tiny",
    "WorkloadConformance",
    "burst",
    "context",
    "hold",
    "tiny_module",
    "tiny_transformer",
]
