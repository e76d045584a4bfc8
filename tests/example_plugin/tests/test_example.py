from __future__ import annotations

from membench_example.metrics import MeanEntropy
from membench_example.models import TwoTables
from membench_example.techniques import TiedHead
from membench_example.workloads import Reread

from membench.testing import MetricConformance, ModelConformance, TechniqueConformance, WorkloadConformance


class TestTiedHead(TechniqueConformance):
    technique = TiedHead


class TestTiedHeadOfTwoTables(TechniqueConformance):
    technique = TiedHead
    model = TwoTables(width=8)


class TestTwoTables(ModelConformance):
    model = TwoTables
    options = {"width": 16}  # noqa: RUF012


class TestMeanEntropy(MetricConformance):
    metric = MeanEntropy


class TestReread(WorkloadConformance):
    workload = Reread
