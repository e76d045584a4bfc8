"""Training a classifier on labelled samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from membench.builtin.models.classifier import Classifier, seed_of
from membench.builtin.workloads import training
from membench.data import samples
from membench.plugins import Context, Samples, Step, Technique, Tokens, Unsuitable, Workload, stepping

if TYPE_CHECKING:
    import torch
    from torch import nn


class TrainClassifier(Workload):
    """Training steps of the model 'classifier' on labelled samples, and its accuracy on held-out ones in the end.

    Parts forward, backward and optimizer; the loss is the cross entropy. Phase ``store`` is where techniques make of
    the samples what is kept of them. Steps that are left after the measured ones follow in the phase ``finish``.

    ``digits``: handwritten ones, 64 pixels, 10 classes; scikit-learn carries them. ``topics-text``: paragraphs of
    Python's help on itself as hashed pieces of their words, 512 features; the 5 classes are parts of its documentation.
    Some 30% of either are held out, always the same: the standard error of a share p over n of them is √(p·(1−p)/n).

    Attributes:
        data: where samples are from.
        steps: of the whole training. The measured ones are among them: there are never fewer than these.
    """

    trains: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = ("torch", "sklearn.datasets")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "digits": {"data": "digits"},
        "topics-text": {"data": "topics-text"},
    }
    data: Literal["digits", "topics-text"] = "digits"
    steps: int = Field(1500, ge=1, le=1_000_000)
    batch_size: int = Field(64, ge=1, le=65_536)
    optimizer: training.Optimizer = "adamw"
    learning_rate: float = Field(3e-3, gt=0)

    def longest_sequence(self) -> int:
        return 0

    def tokens_per_step(self) -> int | None:
        return None

    def steps_in_all(self) -> int:
        return self.steps

    def samples(self) -> Samples:
        if self.data == "digits" and importlib.util.find_spec("sklearn") is None:
            raise Unsuitable("'sklearn' is not installed: pip install 'membench[data]'")
        return samples.read(self.data).train

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        model, drawn = context.model, context.samples
        if not isinstance(model, Classifier):
            raise Unsuitable("train-classifier trains the model 'classifier', which takes feature vectors")
        assert drawn is not None
        if (model.features, model.classes) != (drawn.width, drawn.classes):
            raise Unsuitable(
                f"samples of {self.data} have {drawn.width} features and {drawn.classes} classes, and the model is for "
                f"{model.features} and {model.classes}: use classifier-{self.data}"
            )
        batches = drawn.batches(self.batch_size, seed_of(context))
        return training.steps(
            module,
            lambda: next(batches).to(context.device),
            class_loss,
            self.optimizer,
            self.learning_rate,
            techniques,
            context,
        )

    def examine(self, module: nn.Module, techniques: Sequence[Technique], context: Context) -> None:
        import torch

        rows = samples.read(self.data).held_out.rows().to(context.device)
        with torch.no_grad(), stepping(techniques, context):
            predicted = module(rows[:, :-1]).argmax(1)
        right = int((predicted == rows[:, -1]).sum())
        context.facts["accuracy_percent"] = (100 * right / len(rows), f"count over {len(rows)} held-out samples")


def class_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in fp32 of the classes; ``batch`` (B, features + 1) has them in its last column."""
    import torch

    return torch.nn.functional.cross_entropy(module(batch[:, :-1]).float(), batch[:, -1].long())
