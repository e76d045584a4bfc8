"""Tests that hold a model to its contract, to be inherited.

PYTEST_DONT_REWRITE: what an assertion says is for people who do not know this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from membench.plugins import Model, WrongOutput, logits_of
from membench.testing.fake_worker import FakeWorker
from membench.testing.global_state import GlobalState, restored
from membench.testing.plugin_conformance import PluginConformance
from membench.testing.sameness import is_finite, same, weights_of
from membench.units import format_bytes
from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    from torch import nn

_LONGEST_TRIED = 512
_TOLERATED = 1.1


class ModelConformance(PluginConformance):
    """Inherit it, name the ``model``, and pytest runs these tests on it. It is built as it is: take a small one."""

    kind = ("model", Model)
    model: ClassVar[type[Model]]

    def _worker(self) -> FakeWorker:
        return FakeWorker(model=self.made())

    def test_the_same_seed_gives_the_same_weights(self) -> None:
        __tracebackhide__ = True
        built = []
        for _ in range(2):
            with restored(), self._worker() as worker:
                built.append(weights_of(worker.load()))
        one, other = built
        differing = [pair for pair in zip(one, other, strict=False) if not same(*pair)]
        assert len(one) == len(other), f"the same seed gave {len(one)} tensors, then {len(other)}; expected the same"
        assert not differing, (
            f"the same seed gave other weights the second time: {len(differing)} of {len(one)} tensors differ; begin"
            " 'build' with torch.manual_seed(context.seed)"
        )

    def test_it_gives_logits_for_every_token_it_knows(self) -> None:
        import torch

        __tracebackhide__ = True
        with restored(), self._worker() as worker:
            module, model = worker.load(), worker.context.model
            if not model.gives_logits:
                return
            vocabulary = model.vocabulary(module)
            ids = torch.tensor([[0, vocabulary - 1, 0, vocabulary // 2]])
            try:
                with torch.no_grad():
                    output = module(ids)
            except Exception as error:
                raise AssertionError(
                    f"token ids from 0 to {vocabulary - 1} ended in {type(error).__name__}: {error}; expected that it"
                    " takes (B, T) token ids below 'vocabulary'"
                ) from None
            try:
                logits = logits_of(output, ids)
            except WrongOutput as error:
                raise AssertionError(str(error)) from None
            found, wanted = tuple(logits.shape), (1, 4, vocabulary)
            assert found == wanted, (
                f"of token ids (1, 4) the logits are of shape {found}; expected {wanted}: 'vocabulary' is {vocabulary}"
            )
            assert is_finite(logits), "the logits are not finite; expected finite ones"

    def test_it_takes_sequences_as_long_as_it_says(self) -> None:
        import torch

        __tracebackhide__ = True
        with restored(), self._worker() as worker:
            module, model = worker.load(), worker.context.model
            longest = model.max_tokens()
            if longest is None or not model.gives_logits:
                return
            length = min(longest, _LONGEST_TRIED)
            try:
                with torch.no_grad():
                    module(torch.zeros(1, length, dtype=torch.long))
            except Exception as error:
                raise AssertionError(
                    f"{length} tokens ended in {type(error).__name__}: {error}; max_tokens says that it takes {longest}"
                ) from None

    def test_its_skeleton_has_the_shapes_of_what_is_built(self) -> None:
        __tracebackhide__ = True
        with restored(), self._worker() as worker:
            module, model = worker.load(), worker.context.model
            try:
                skeleton = model.skeleton()
            except NotImplementedError:
                return
            elsewhere = [name for name, p in skeleton.named_parameters() if p.device.type != "meta"]
            assert not elsewhere, (
                f"'{elsewhere[0]}' of the skeleton lies on a {skeleton.get_parameter(elsewhere[0]).device}; expected"
                " 'with torch.device(\"meta\")' around what makes it"
            )
            built, outlined = _shapes(module), _shapes(skeleton)
            for name in built | outlined:
                assert built.get(name) == outlined.get(name), (
                    f"parameter '{name}' is {built.get(name, 'not there')} as it is built, and"
                    f" {outlined.get(name, 'not there')} in the skeleton; expected the same"
                )

    def test_it_needs_the_bytes_that_it_says(self) -> None:
        __tracebackhide__ = True
        with restored(), self._worker() as worker:
            module, said = worker.load(), worker.context.model.needed_bytes()
            if said is None:
                return
            held = weight_bytes(module)
            assert held / _TOLERATED <= said <= held * _TOLERATED, (
                f"needed_bytes says {format_bytes(said)}, and what is built holds {format_bytes(held)}; expected that,"
                " or None where it is not known"
            )

    def test_it_leaves_the_process_as_it_was(self) -> None:
        __tracebackhide__ = True
        with restored(), self._worker() as worker:
            worker.load()  # what libraries set up once is none of the model's doing
        with restored(), self._worker() as worker:
            state = GlobalState()
            worker.load()
            changes = state.changes(drawing=True)
            assert not changes, f"after building, {'; '.join(changes)}; expected 'build' to put back what it changes"


def _shapes(module: nn.Module) -> dict[str, str]:
    return {name: f"{tuple(p.shape)} in {str(p.dtype).removeprefix('torch.')}" for name, p in module.named_parameters()}
