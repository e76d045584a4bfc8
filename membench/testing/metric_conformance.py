"""Tests that hold a quality metric to its contract, to be inherited.

PYTEST_DONT_REWRITE: what an assertion says is for people who do not know this file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from membench.plugins import HeldOut, Model, QualityMetric
from membench.testing.fake_worker import FakeWorker
from membench.testing.global_state import GlobalState, restored
from membench.testing.plugin_conformance import PluginConformance
from membench.testing.sameness import same, weights_of
from membench.worker import quality

if TYPE_CHECKING:
    import torch

_PIECES = 2


class MetricConformance(PluginConformance):
    """Inherit it, name the ``metric``, and pytest runs these tests on it, on two pieces of held-out text."""

    kind = ("metric", QualityMetric)
    metric: ClassVar[type[QualityMetric]]
    model: ClassVar[Model | None] = None
    """Whose quality it is tried on; ``None``: ``Tiny``."""

    def _figure(self, worker: FakeWorker) -> float:
        """Of a module that is ready."""
        import torch

        case, module = worker.context, worker.module.eval()
        pieces = [piece.ids for piece in quality.pieces(case.model, module, worker.workload)[:_PIECES]]

        def of_reference(number: int) -> torch.Tensor:
            """The module is its own: it is as far from it as from nothing."""
            return worker.logits(torch.tensor(pieces[number][:-1])).float()

        with torch.no_grad():
            measured: float = self.made().measure(module, HeldOut(pieces, worker.logits, of_reference), case)
        return measured

    def test_its_figure_is_a_finite_number_and_the_same_each_time(self) -> None:
        __tracebackhide__ = True
        with restored(), FakeWorker(model=self.model) as worker:
            worker.apply()
            one, other = self._figure(worker), self._figure(worker)
        for figure in (one, other):
            assert isinstance(figure, float | int), f"its figure is {figure!r}; expected a number"
            assert math.isfinite(figure), (
                f"its figure is {figure!r}; expected a finite number, or Unsuitable with the reason"
            )
        assert one == other, f"of the same model it says {one!r}, then {other!r}; expected the same figure"

    def test_it_leaves_the_model_and_the_process_as_they_were(self) -> None:
        __tracebackhide__ = True
        with restored(), FakeWorker(model=self.model) as worker:
            before = [tensor.detach().clone() for tensor in weights_of(worker.apply())]
            self._figure(worker)  # so that what libraries set up once is there
            state = GlobalState()
            self._figure(worker)
            changes = state.changes(drawing=False)
            assert not changes, f"after measuring, {'; '.join(changes)}; expected it to put back what it changes"
            changed = sum(not same(*pair) for pair in zip(before, weights_of(worker.module), strict=True))
            assert not changed, f"measuring changed {changed} of {len(before)} tensors of the model; expected none"
