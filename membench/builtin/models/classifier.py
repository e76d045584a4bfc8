"""A small classifier of feature vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.data.samples import CHAPTERS
from membench.plugins import Context, Model, Unsuitable

if TYPE_CHECKING:
    from torch import nn


class Classifier(Model):
    """A perceptron of one hidden layer on feature vectors, for the workload train-classifier.

    Attributes:
        features: numbers of a sample; ``digits`` have 64, ``topics-text`` 512.
        classes: of ``digits`` there are 10, of ``topics-text`` 5.
        hidden: width of the hidden layer.
        seed: added to the suite's, for all that is random about the case: weights, batches, generators, subsets.
            Variants of the model with different seeds are a case's repeats with other luck.
    """

    gives_logits: ClassVar[bool] = False  # for token ids, that is
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "digits": {"features": 64, "classes": 10},
        "topics-text": {"features": 512, "classes": len(CHAPTERS)},
    }
    features: int = Field(64, ge=1, le=1_048_576)
    classes: int = Field(10, ge=2, le=256)
    hidden: int = Field(256, ge=1, le=65_536)
    seed: int = Field(0, ge=0, le=2**31)

    def build(self, context: Context) -> nn.Module:
        import torch

        torch.manual_seed(seed_of(context))
        return self._layers().to(context.device)

    def skeleton(self) -> nn.Module:
        import torch

        with torch.device("meta"):
            return self._layers()

    def miniature(self) -> Model:
        return self

    def vocabulary(self, module: nn.Module) -> int:
        raise Unsuitable("a classifier takes feature vectors, and no text: use the workload train-classifier")

    def _layers(self) -> nn.Module:
        from membench.builtin.layers.perceptron import Perceptron

        return Perceptron(self.features, self.hidden, self.classes)


def seed_of(context: Context) -> int:
    """The suite's seed and the model's own together."""
    return context.seed + (context.model.seed if isinstance(context.model, Classifier) else 0)
