"""Tests that hold a workload to its contract, to be inherited.

PYTEST_DONT_REWRITE: what an assertion says is for people who do not know this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from membench.plugins import Context, Model, Technique, TrainingStep, Workload
from membench.testing.fake_worker import FakeWorker
from membench.testing.global_state import GlobalState, restored
from membench.testing.plugin_conformance import PluginConformance
from membench.testing.sameness import same, weights_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_STEPS = 2


class _Witness(Technique):
    """Changes nothing, and sees which of its stages a workload asks for and what reaches the module."""

    _inside: bool = PrivateAttr(False)
    _stages: set[str] = PrivateAttr(default_factory=set)
    _passes_outside: int = PrivateAttr(0)
    _sequences: list[tuple[int, ...]] = PrivateAttr(default_factory=list)

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        module.register_forward_pre_hook(self._see)
        return module

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._passes_outside += not self._inside
        self._sequences += [tuple(x.shape) for x in inputs[:1] if not x.is_floating_point()]

    def step_context(self, context: Context) -> AbstractContextManager[Any]:
        @contextmanager
        def entered() -> Iterator[None]:
            self._inside = True
            yield
            self._inside = False

        return entered()

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        self._stages.add("optimizer")
        return optimizer

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        self._stages.add("training_step")
        return step

    @property
    def stages(self) -> set[str]:
        return self._stages

    @property
    def passes_outside(self) -> int:
        """Forward passes that ran in no context of the stack."""
        return self._passes_outside

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """Shapes of the token ids of each forward pass."""
        return self._sequences


class WorkloadConformance(PluginConformance):
    """Inherit it, name the ``workload``, and pytest runs these tests on it."""

    kind = ("workload", Workload)
    workload: ClassVar[type[Workload]]
    model: ClassVar[Model | None] = None
    """What it is tried on; ``None``: ``Tiny``."""

    def _worker(self, *techniques: Technique) -> FakeWorker:
        return FakeWorker(techniques, model=self.model, workload=self.made())

    def _watched(self) -> tuple[_Witness, Workload]:
        """A witness of some steps."""
        witness = _Witness()
        with restored(), self._worker(witness) as worker:
            for _ in range(_STEPS):
                worker.step()
        return witness, worker.workload

    def test_the_same_seed_gives_the_same_steps(self) -> None:
        __tracebackhide__ = True
        outcomes = []
        for _ in range(2):
            with restored(), self._worker() as worker:
                losses = [worker.step() for _ in range(_STEPS)]
                outcomes.append((losses, weights_of(worker.module)))
        (losses, weights), (other_losses, other_weights) = outcomes
        remedy = "draw from torch.Generator().manual_seed(context.seed)"
        assert str(losses) == str(other_losses), f"the same seed gave losses {losses}, then {other_losses}; {remedy}"
        assert all(same(*pair) for pair in zip(weights, other_weights, strict=True)), (
            f"the same seed left other weights the second time; {remedy}"
        )

    def test_it_trains_if_it_says_so_and_else_changes_no_weight(self) -> None:
        __tracebackhide__ = True
        with restored(), self._worker() as worker:
            module = worker.apply()
            before = [tensor.detach().clone() for tensor in weights_of(module)]
            losses = [worker.step() for _ in range(_STEPS)]
            changed = sum(not same(*pair) for pair in zip(before, weights_of(module), strict=True))
            if worker.workload.trains:
                assert None not in losses, "it trains, and a step returned no loss; expected the loss, detached"
                assert changed, f"it trains, and {_STEPS} steps changed no weight; expected an optimizer's step"
            else:
                assert not changed, (
                    f"steps changed {changed} of {len(before)} tensors; set trains = True if they are to"
                )

    def test_it_asks_the_stack_for_what_it_does(self) -> None:
        __tracebackhide__ = True
        witness, workload = self._watched()
        assert not witness.passes_outside, (
            f"{witness.passes_outside} of {len(witness.sequences)} forward passes ran outside the contexts of the"
            " stack; expected 'with stepping(techniques, context):' around each"
        )
        for stage in ("optimizer", "training_step") if workload.trains else ():
            assert stage in witness.stages, (
                f"it trains, and no technique was asked for its '{stage}'; expected each of the stack to be asked"
            )

    def test_no_sequence_is_longer_than_it_says(self) -> None:
        __tracebackhide__ = True
        witness, workload = self._watched()
        longest, said = max((shape[-1] for shape in witness.sequences), default=0), workload.longest_sequence()
        assert longest <= said, f"the model saw {longest} tokens in a row, and longest_sequence says {said}"

    def test_a_step_works_through_the_tokens_that_it_says(self) -> None:
        __tracebackhide__ = True
        witness, workload = self._watched()
        said = workload.tokens_per_step()
        if said is None or not witness.sequences:
            return
        seen = sum(_count(shape) for shape in witness.sequences) / _STEPS
        assert said <= seen, (
            f"tokens_per_step says {said}, and the model saw {seen:g} a step; expected no more than it saw"
        )

    def test_it_leaves_the_process_as_it_was(self) -> None:
        __tracebackhide__ = True
        with restored(), self._worker() as worker:
            worker.step()  # what libraries set up once is none of the workload's doing
        with restored(), self._worker() as worker:
            worker.apply()
            state = GlobalState()
            worker.step()
            changes = state.changes(drawing=True)
            assert not changes, f"after a step, {'; '.join(changes)}; expected a step to put back what it changes"


def _count(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape:
        rows *= size
    return rows
