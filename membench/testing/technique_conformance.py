"""Tests that hold a technique to its contract, to be inherited.

PYTEST_DONT_REWRITE: what an assertion says is for people who do not know this file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from membench.builtin.techniques.precision import Bf16
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.read_data import ReadData
from membench.plugins import Model, NotInModel, Technique, Unsuitable, Workload
from membench.testing.claims import wrong_with_states, wrong_with_weights
from membench.testing.fake_worker import FakeWorker, tiny_training
from membench.testing.global_state import GlobalState, restored
from membench.testing.holdings import SLACK_BYTES, Surroundings, by_layer
from membench.testing.plugin_conformance import PluginConformance
from membench.testing.sameness import ids_to_read, is_finite, same, weights_of
from membench.units import format_bytes
from membench.worker.breakdown import tensors_in
from membench.worker.storages import storages

if TYPE_CHECKING:
    import torch


class TechniqueConformance(PluginConformance):
    """Inherit it, name the ``technique``, and pytest runs these tests on it.

    They take what the harness relies on: options that go through JSON, a module that is loaded without torch, the same
    outcome from the same seed, no bytes but those it claims and none beside the model, a place in a stack before and
    after another technique, and a process that is left as it was.
    """

    kind = ("technique", Technique)
    technique: ClassVar[type[Technique]]
    model: ClassVar[Model | None] = None
    """What it is tried on; ``None``: ``Tiny``."""
    workload: ClassVar[Workload | None] = None
    """What is done meanwhile; ``None``: a small training, or if that is refused a forward pass, or reading data."""
    partner: ClassVar[Technique] = Bf16()
    """What it is stacked with."""

    def _device(self) -> str:
        import pytest

        technique = self.made()
        for module, distribution in technique.needs.items():
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"'{module}' is not installed: pip install '{distribution}'")
        if "cpu" in technique.devices:
            return "cpu"
        import torch

        if not torch.cuda.is_available():
            pytest.skip(f"it runs on {', '.join(technique.devices)} alone, which this machine has not")
        return "cuda"

    def _workload(self) -> Workload:
        """That of the class, or the first that the technique does not refuse."""
        __tracebackhide__ = True
        if self.workload is not None:
            return self.workload
        reasons = {}
        data = ReadData(data="topics", data_size=16_384, batch_size=2, sequence_length=16)
        for workload in (tiny_training(), Forward(batch_size=1, sequence_length=16), data):
            with FakeWorker([self.made()], model=self.model, workload=workload) as worker:
                reason = worker.refused()
            if reason is None:
                return workload
            reasons[type(workload).__name__] = reason
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise AssertionError(f"it refuses what it would be tried on ({said}); set 'workload' or 'model' of this class")

    def _worker(self, *techniques: Technique) -> FakeWorker:
        __tracebackhide__ = True
        return FakeWorker(techniques, model=self.model, workload=self._workload(), device=self._device())

    @contextmanager
    def _trial(self, technique: Technique | None = None) -> Iterator[FakeWorker]:
        """A case of the technique alone, after which the process is as it was."""
        __tracebackhide__ = True
        with restored(), self._worker(technique or self.made()) as worker:
            try:
                yield worker
            except (NotInModel, Unsuitable) as error:
                raise AssertionError(
                    f"it cannot serve the case that it is tried on ({error}); set 'model' or 'workload' of this class:"
                    " model = membench.testing.tiny_transformer(), say"
                ) from None

    def test_a_model_still_works_with_it(self) -> None:
        __tracebackhide__ = True
        with self._trial() as worker:
            wrong = _what_is_wrong(worker)
            assert wrong is None, wrong

    def test_the_same_seed_gives_the_same_weights_and_logits(self) -> None:
        __tracebackhide__ = True
        outcomes: list[tuple[list[torch.Tensor], list[float | None], torch.Tensor | None]] = []
        for _ in range(2):
            with self._trial() as worker:
                module = worker.apply()
                weights = [tensor.detach().clone() for tensor in weights_of(module)]
                logits = worker.logits(ids_to_read()) if worker.context.model.gives_logits else None
                # On a GPU sums of gradients come in any order.
                losses = [worker.step(), worker.step()] if worker.context.device == "cpu" else []
                outcomes.append((weights, losses, logits))
        (weights, losses, logits), (other_weights, other_losses, other_logits) = outcomes
        remedy = "draw from torch.Generator().manual_seed(context.seed)"
        differing = [number for number, pair in enumerate(zip(weights, other_weights, strict=False)) if not same(*pair)]
        assert len(weights) == len(other_weights), (
            f"the same seed gave {len(weights)} tensors, then {len(other_weights)}; expected the same"
        )
        assert not differing, (
            f"the same seed gave other weights the second time: {len(differing)} of {len(weights)} tensors differ;"
            f" {remedy}"
        )
        assert logits is None or other_logits is None or same(logits, other_logits), (
            f"the same seed and the same weights gave other logits the second time; {remedy}"
        )
        assert str(losses) == str(other_losses), f"the same seed gave losses {losses}, then {other_losses}; {remedy}"

    def test_it_saves_the_bytes_that_it_claims(self) -> None:
        __tracebackhide__ = True
        technique = self.made()
        with self._trial(technique) as worker:
            before = by_layer(worker.context.model.build(worker.context))
            module = worker.apply()
            share = technique.nominal_share()
            if share is not None and not technique.trains_adapters:
                wrong = wrong_with_weights(technique.nominal_bits(), share, before, by_layer(module, before))
                assert wrong is None, wrong
            claimed = technique.nominal_state_bytes()
            if claimed is not None and worker.workload.trains:
                worker.step()
                trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
                state = storages(tensors_in(worker.context.inventory["optimizer"]()))
                wrong = wrong_with_states(claimed, sum(state.values()), trained)
                assert wrong is None, wrong

    def test_it_keeps_nothing_beside_the_model(self) -> None:
        __tracebackhide__ = True
        with self._trial() as worker:
            worker.apply()  # so that what libraries keep from their first call on is there
        with self._trial() as worker:
            surroundings = Surroundings()
            try:
                beside = surroundings.additions(worker.apply())
            finally:
                surroundings.release()
            size = sum(storages(beside).values())
            largest = max(beside, key=lambda tensor: tensor.nbytes, default=None)
            assert largest is None or size <= SLACK_BYTES, (
                f"{format_bytes(size)} live beside the model that no layer of it keeps, the largest a"
                f" {type(largest).__name__} of {tuple(largest.shape)} in {_name(largest.dtype)}: they would be missing"
                " in the figure 'weights'; expected that they are let go, or kept as a parameter, buffer or attribute"
                " of a layer"
            )

    def test_it_works_before_another_technique(self) -> None:
        __tracebackhide__ = True
        self._hold_in_stack(self.made(), self.partner)

    def test_it_works_after_another_technique(self) -> None:
        __tracebackhide__ = True
        self._hold_in_stack(self.partner, self.made())

    def _hold_in_stack(self, *techniques: Technique) -> None:
        import pytest

        __tracebackhide__ = True
        stack = " and then ".join(type(technique).__name__ for technique in techniques)
        with self._worker(*techniques) as worker:
            if worker.refused() is not None:
                return  # a refusal that says why is right
        try:
            with self._trial() as worker:
                alone = _what_is_wrong(worker)
        except Exception as error:
            alone = f"{type(error).__name__}: {error}"
        if alone is not None:
            pytest.skip(f"it does not work alone: {alone}")
        try:
            with restored(), self._worker(*techniques) as worker:
                wrong = _what_is_wrong(worker)
        except Unsuitable:
            return
        except Exception as error:
            raise AssertionError(
                f"the stack of {stack} ended in {type(error).__name__}: {error}; expected that it works, or that"
                " 'refuse' says why it cannot"
            ) from error
        assert wrong is None, f"of the stack of {stack}: {wrong}"

    def test_it_leaves_the_process_as_it_was(self) -> None:
        __tracebackhide__ = True
        with self._trial() as worker:
            # What libraries set up once is none of the technique's doing.
            worker.step()
        with self._trial() as worker:
            stages: tuple[tuple[str, Callable[[], object]], ...] = (
                ("loading", worker.load), ("applying", worker.apply), ("a step", worker.step)
            )  # fmt: skip
            for stage, go in stages:
                state = GlobalState()
                go()
                # Loading seeds torch's generator, and a training may draw from it.
                changes = state.changes(drawing=stage != "applying")
                assert not changes, (
                    f"after {stage}, {'; '.join(changes)}; expected that a stage puts back what it changes"
                    " (torch.random.fork_rng() for random numbers, step_context for what must hold during a step)"
                )


def _what_is_wrong(worker: FakeWorker) -> str | None:
    """What is wrong with a model that has gone through the stages and two steps; raises what a stage raises."""
    module = worker.apply()
    losses = [worker.step(), worker.step()]
    if any(loss is not None and not is_finite(loss) for loss in losses):
        return f"the losses of two steps are {losses[0]} and {losses[1]}; expected finite ones"
    if not worker.context.model.gives_logits:
        return None
    ids, vocabulary = ids_to_read(), worker.context.model.vocabulary(module)
    logits = worker.logits(ids)
    if tuple(logits.shape) != (len(ids), vocabulary):
        wanted = (len(ids), vocabulary)
        return f"logits of {len(ids)} tokens are of shape {tuple(logits.shape)}; expected {wanted}"
    return None if is_finite(logits) else "the logits are not finite; expected finite ones"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
