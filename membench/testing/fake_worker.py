"""A case gone through in the process of a test: the stages as the measured process calls them, and nothing measured."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from membench.builtin.workloads.train import Train
from membench.plugins import Context, Model, Setting, Step, Technique, Unsuitable, Workload, stepping
from membench.testing.tiny import Tiny
from membench.worker.assembly import Assembly

if TYPE_CHECKING:
    import torch
    from torch import nn


def context(scratch: Path, model: Model | None = None, device: str = "cpu", seed: int = 0) -> Context:
    """What a stage is called with: ``technique.apply(module, context(tmp_path))``.

    Args:
        scratch: a folder for files, which nobody removes here.
        model: ``Tiny`` if it is not given.
    """
    return Context(device, seed, model or Tiny(), lambda name: contextlib.nullcontext(), {}, scratch)


def tiny_training() -> Workload:
    """A training with two rows of 16 tokens a step."""
    return Train(batch_size=2, sequence_length=16, learning_rate=1e-4)


class FakeWorker:
    """A case of plug-ins, stage by stage. ``with FakeWorker([Half()]) as worker: worker.step()``

    Attributes:
        context: what the stages are called with.
        workload: what ``step`` does.
        parts: the parts of steps that were entered, in order.
        module: the model, once it is loaded.
    """

    module: nn.Module

    def __init__(
        self,
        techniques: Sequence[Technique] = (),
        *,
        model: Model | None = None,
        workload: Workload | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """``model`` is ``Tiny`` and ``workload`` a small training if they are not given."""
        self.parts: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="membench-testing-")
        surroundings = dataclasses.replace(context(Path(self._folder.name), model, device, seed), part=self._part)
        names = tuple(type(technique).__name__ for technique in techniques)
        self.workload = workload or tiny_training()
        self._case = Assembly(surroundings.model, tuple(techniques), self.workload, names, surroundings)
        self._is_applied = False
        self._step: Step | None = None

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self.parts.append(name)
        yield

    @property
    def context(self) -> Context:
        return self._case.context

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def refused(self) -> str | None:
        """Why the case would be refused or skipped: what the first technique says that cannot serve it."""
        case = self._case
        for position, technique in enumerate(case.techniques):
            before, after = case.techniques[:position], case.techniques[position + 1 :]
            setting = Setting(case.model, case.workload, case.context.device, before, after)
            if reason := technique.check(setting) or technique.refuse(setting):
                return reason
        return None

    def load(self) -> nn.Module:
        """Prepare and load: the module as it is before ``apply``.

        Raises:
            Unsuitable: if the case would be skipped.
        """
        import torch

        if reason := self.refused():
            raise Unsuitable(reason)
        case = self._case
        for plugin in (case.model, case.workload, *case.techniques):
            for name in plugin.imports:
                importlib.import_module(name)  # as the fork server does
        case.model.prepare(lambda done, total, what: None)
        for position, technique in reversed(list(enumerate(case.techniques))):
            rest = case.techniques[position + 1 :] if technique.prepares_rest else ()
            technique.prepare(dataclasses.replace(case, techniques=rest).make, case.context)
        torch.manual_seed(case.context.seed)
        self.module = case.load()
        return self.module

    def apply(self) -> nn.Module:
        """Convert what was loaded; it is loaded if it was not."""
        if not hasattr(self, "module"):
            self.load()
        self.module = self._case.apply(self.module)
        self._is_applied = True
        self.module.train(self._case.workload.trains)
        return self.module

    def step(self) -> float | None:
        """Do a step of the workload; its loss, if it trains. The first begins with whatever has not been done."""
        if self._step is None:
            if not self._is_applied:
                self.apply()
            self._case = self._case.store(self.module)
            case = self._case
            self._step = case.workload.start(self.module, case.tokens(self.module), case.techniques, case.context)
        loss = self._step()
        return None if loss is None else loss.item()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocabulary) of token ids (T,), read as held-out text is; then it is as before."""
        import torch

        case, trains = self._case, self.module.training
        self.module.eval()
        with torch.no_grad(), stepping(case.techniques, case.context):
            found = case.workload.logits(self.module, ids.to(case.context.device), case.techniques, case.context)
        self.module.train(trains)
        return found
