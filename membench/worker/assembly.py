"""Puts a case together inside the worker: its plug-ins, its files, its rehearsal, its module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench import plugins
from membench.data import corpus, sources, tokens
from membench.data.dataset import Dataset
from membench.data.epochs import endless
from membench.data.layouts import Integers
from membench.data.samples import StoredSamples
from membench.data.shards import Shards
from membench.errors import summary
from membench.host.device import Device
from membench.host.environment import available_bytes
from membench.plugins import registry
from membench.plugins.storage import Storage
from membench.protocol.case import Plugin
from membench.protocol.requests import MeasureCase
from membench.units import format_bytes
from membench.worker import device
from membench.worker.rehearsal_model import StandIn
from membench.worker.weights import fingerprint

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.plugins.storage import Ids


_REHEARSED_BYTES = 2**17

_UNSUITABLE = 3
"""How a process that prepares ends where a technique cannot serve the case."""


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A case's plug-ins; ``names`` are the stack's members as the suite wrote them, ``metrics`` are by field."""

    model: plugins.Model
    techniques: tuple[plugins.Technique, ...]
    workload: plugins.Workload
    names: tuple[str, ...]
    context: plugins.Context
    metrics: Mapping[str, plugins.QualityMetric] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        asked: MeasureCase,
        device: str,
        scratch: Path,
        part: Callable[[str], contextlib.AbstractContextManager[None]],
    ) -> Assembly:
        """Create what a request names.

        Args:
            device: of this rank, as torch names it.
            part: marks a part of a step.

        Raises:
            plugins.Unsuitable: if a member cannot serve the case, or wants a library that is not installed.
        """
        model, workload = create("model", asked.model), create("workload", asked.workload)
        techniques = tuple(create("technique", named) for named in asked.techniques)
        for position, technique in enumerate(techniques):
            for module, distribution in technique.needs.items():
                if importlib.util.find_spec(module) is None:
                    raise plugins.Unsuitable(f"'{module}' is not installed: pip install '{distribution}'")
            before, after = techniques[:position], techniques[position + 1 :]
            reason = technique.refuse(plugins.Setting(model, workload, device, before, after))
            if reason:
                raise plugins.Unsuitable(reason)
        context = plugins.Context(device, asked.seed, model, part, {}, scratch, corpus=workload.corpus())
        metrics = {field: create("metric", named) for field, named in asked.metrics.items()}
        return cls(model, techniques, workload, tuple(asked.members), context, metrics)

    def rehearsed(self) -> Assembly | None:
        """The same case on a miniature of its model, or a stand-in, unheard by the runner.

        ``None`` for a model that gives no logits: nothing can stand in for it.
        """
        miniature = self.model.miniature() or (StandIn() if self.model.gives_logits else None)
        if miniature is None:
            return None
        scratch = self.context.scratch / "rehearsal"
        scratch.mkdir(exist_ok=True)
        context = dataclasses.replace(
            self.context, model=miniature, part=_unheard, inventory={}, scratch=scratch, idle=[], diverged=[],
            facts={}, rehearsal=True,
        )  # fmt: skip
        return dataclasses.replace(self, model=miniature, context=context)

    @property
    def applied(self) -> list[plugins.Technique]:
        """The members whose ``load`` and ``apply`` are called: those after one that ``applies_rest`` have been."""
        found = []
        for technique in self.techniques:
            found.append(technique)
            if technique.applies_rest:
                break
        return found

    def load(self) -> nn.Module:
        build: Callable[[], nn.Module] = functools.partial(self.model.build, self.context)
        for position, technique in enumerate(self.applied):
            build = functools.partial(technique.load, build, self.techniques[position + 1 :], self.context)
        return build()

    def apply(self, module: nn.Module) -> nn.Module:
        """Phase ``apply``; members that change nothing in the module are kept in ``context.idle``."""
        for technique in self.applied:
            if type(technique).apply is plugins.Technique.apply:
                continue
            before = fingerprint(module)
            module = plugins.given_back(technique.apply(module, self.context), technique, "apply", "module")
            if fingerprint(module) == before:
                self.context.idle.append(technique)
        return module

    def make(self) -> nn.Module:
        """The module with every technique applied, as ``load`` and ``apply`` leave it."""
        return self.apply(self.load())

    def remarks_on_idle(self) -> list[str]:
        """On each member that converts the model, does nothing else, and changed nothing in it."""
        return [
            f"'{name}' changed nothing in the model"
            for name, technique in zip(self.names, self.techniques, strict=True)
            if not _acts_while_running(technique) and any(technique is idle for idle in self.context.idle)
        ]

    def read_text(self) -> None:
        """Read and encode the text now: it is the harness's and belongs to the baseline."""
        corpus.read()
        self.model.encode(corpus.split()[0])
        self.workload.samples()
        if (wanted := self.workload.corpus()) is None:
            return
        sources.documents(wanted.source, wanted.most_bytes)
        with contextlib.suppress(NotImplementedError):  # a model without a skeleton says its vocabulary later
            vocabulary = self.model.vocabulary(self.model.skeleton())
            if are_words := tokens.are_words(self.model, vocabulary):
                tokens.replaced_in(wanted.source, wanted.most_bytes)
            if not self._changes_corpus:
                self._rows(wanted, vocabulary)
            elif are_words:
                tokens.words_of(wanted.source, wanted.most_bytes)

    def notes_on_text(self, module: nn.Module) -> list[str]:
        """A note if some of the corpus is no text, and was replaced."""
        wanted = self.workload.corpus()
        if wanted is None or not tokens.are_words(self.model, self.model.vocabulary(module)):
            return []
        count = tokens.replaced_in(wanted.source, wanted.most_bytes)
        return [f"not UTF-8, and read as U+FFFD: {count:,} bytes or cut-off characters of the text"] if count else []

    def digest(self) -> str:
        """A hash of the text that the workload works on, before any technique."""
        wanted = self.workload.corpus()
        return corpus.digest() if wanted is None else sources.digest(wanted.source, wanted.most_bytes)

    @property
    def _changes_corpus(self) -> bool:
        return any(type(technique).corpus is not plugins.Technique.corpus for technique in self.techniques)

    def _rows(self, wanted: plugins.Corpus, vocabulary: int) -> tuple[Ids, int]:
        """Rows of token ids, and how many of them are padding."""
        most_bytes, padded = wanted.most_bytes, self._storage().padded
        if self.context.rehearsal:
            most_bytes = min(_REHEARSED_BYTES, most_bytes or _REHEARSED_BYTES)
        if not self._changes_corpus:
            return _rows_of(wanted.source, most_bytes, self.model, vocabulary, wanted.length, padded)
        found = sources.documents(wanted.source, most_bytes)
        for technique in self.techniques:
            found = plugins.given_back(technique.corpus(found, self.context), technique, "corpus", "documents")
        words = functools.partial(tokens.words_of, wanted.source, wanted.most_bytes)
        return tokens.rows(tokens.encoded(found, self.model, vocabulary, words), wanted.length, padded)

    def _storage(self) -> Storage:
        storage = Storage(Shards(), Integers("int64"))
        for technique in self.techniques:
            returned = technique.data_storage(storage, self.context)
            storage = plugins.given_back(returned, technique, "data_storage", "storage")
        return storage

    def store(self, module: nn.Module) -> Assembly:
        """Keep the training data as the stack says, and read them once to see that they are right.

        Raises:
            plugins.Unsuitable: if there are too few for one batch.
        """
        if (samples := self.workload.samples()) is not None:
            return self._store_samples(samples)
        wanted = self.workload.corpus()
        if wanted is None:
            return self
        vocabulary = self.model.vocabulary(module)
        rows, padding = self._rows(wanted, vocabulary)
        if len(rows) < wanted.batch_size:
            raise plugins.Unsuitable(
                f"the data give {len(rows)} rows of {wanted.length} tokens, and a batch wants {wanted.batch_size}"
            )
        folder, storage = self.context.scratch / "data", self._storage()
        with self.context.part("compress") if storage.codec else contextlib.nullcontext():
            data = Dataset.written(rows, storage, vocabulary, folder, padding)
        # What a technique says itself stands: a generator is what has to be kept, not what it has generated.
        self.context.facts.update(data.facts() | self.context.facts)
        return dataclasses.replace(self, context=dataclasses.replace(self.context, data=data))

    def _store_samples(self, samples: plugins.Samples) -> Assembly:
        if isinstance(samples, StoredSamples):
            samples = samples.copied()  # those that were read before the baseline are the harness's
        for technique in self.techniques:
            samples = plugins.given_back(technique.samples(samples, self.context), technique, "samples", "samples")
        self.context.facts["data_bytes"] = (samples.kept_bytes, "bytes of what samples are drawn from, as it is kept")
        return dataclasses.replace(self, context=dataclasses.replace(self.context, samples=samples))

    def tokens(self, module: nn.Module) -> plugins.Tokens:
        """The training text as the model reads it: batches of the data, or where there are none, from its start."""
        import torch

        if self.context.samples is not None:
            return _no_tokens
        if (data := self.context.data) is not None and (wanted := self.workload.corpus()) is not None:
            batches = endless(data, wanted.batch_size, self.context.seed, wanted.workers)
            return lambda count: next(batches).flatten().to(torch.int64)
        vocabulary = self.model.vocabulary(module)
        encoded = self.model.encode(corpus.split()[0])
        following = corpus.stream(corpus.ids(vocabulary) if encoded is None else encoded, vocabulary)
        return lambda count: torch.tensor(following(count), dtype=torch.long)

    def prepare(self) -> None:
        """Let techniques prepare their files in a process of their own, so that nothing of it is left in this one.

        To be called before this process has threads: they do not come along.

        Raises:
            RuntimeError: if that process did not end well, with the last line it had to say.
            plugins.Unsuitable: if the technique said so.
        """
        # From the last to the first: who prepares the rest of the stack needs what the rest has prepared.
        for position, technique in reversed(list(enumerate(self.techniques))):
            if type(technique).prepare is not plugins.Technique.prepare:
                rest = self.techniques[position + 1 :] if technique.prepares_rest else ()
                found = _in_a_process_of_its_own(functools.partial(self._prepare_one, technique, rest))
                self.context.idle.extend(rest[place] for place in found["idle"])
                self.context.diverged.extend(found["diverged"])

    def _prepare_one(self, technique: plugins.Technique, rest: Sequence[plugins.Technique]) -> dict[str, list[Any]]:
        """Prepare; the places of those of the rest that changed nothing, and trainings that diverged."""
        import torch

        def prepare(assembly: Assembly) -> None:
            names = tuple(map(str, range(len(rest))))
            made = dataclasses.replace(assembly, techniques=tuple(rest), names=names)
            technique.prepare(made.make, assembly.context)

        rehearsed = self.rehearsed()
        if rehearsed is not None:
            with contextlib.suppress(Exception):  # as in rehearse
                prepare(rehearsed)
        torch.manual_seed(self.context.seed)  # as the measured process does before it loads
        prepare(self)
        idle = [place for place, member in enumerate(rest) if any(member is each for each in self.context.idle)]
        return {"idle": idle, "diverged": self.context.diverged}

    def plain_weight_bytes(self) -> int | None:
        """Bytes of the model's weights in fp32 before any technique, by its shapes; ``None`` where it has none."""
        try:
            return sum(parameter.numel() * 4 for parameter in self.model.skeleton().parameters())
        except Exception:  # a model that cannot be made of shapes alone
            return None

    def rehearse(self) -> str | None:
        """Go through the case on a miniature of its model, so that what is set up once is there before the baseline.

        Thread pool, CUDA context, kernels' code pages, lazily imported modules: some 10 MiB that the first step of
        whatever comes first would be charged for.

        Returns:
            why it did not get to its end, if it did not: it fails again where it is measured, or the small shape alone
            was why.
        """
        device.wake(self.context.device)
        assembly = self.rehearsed()
        if assembly is None:
            return None
        with contextlib.suppress(Exception):
            self.model.skeleton()  # imports the model's own code, which a stand-in would not
        try:
            module = assembly.make()
            module.train(self.workload.trains)
            assembly = assembly.store(module)
            step = self.workload.start(module, assembly.tokens(module), self.techniques, assembly.context)
            step()
        except Exception as error:
            return summary(error)
        return None

    def refuse_what_cannot_fit(self) -> None:
        """Compare what the shapes need with what is free, before anything is loaded.

        Raises:
            plugins.DoesNotFit: if it is more.
        """
        import torch

        if any(type(technique).load is not plugins.Technique.load for technique in self.techniques):
            return  # loaded in a way of its own, a model may need less than it has weights
        needed = self.model.needed_bytes()
        if needed is None:
            return
        if Device.parse(self.context.device).on_gpu:
            free, where = torch.cuda.mem_get_info(self.context.device)[0], "free on the GPU"
        else:
            free, where = available_bytes(), "available on this machine"
        if needed > free:
            raise plugins.DoesNotFit(f"loading needs {format_bytes(needed)}; {format_bytes(free)} are {where}")


def create(kind: str, named: Plugin) -> Any:
    """A plug-in of a request.

    Raises:
        PluginError: if it is not there, or the file that it is in has changed.
    """
    return registry.create(kind, named.use, named.options, named.files)


@functools.cache
def _rows_of(
    source: str, most_bytes: int | None, model: plugins.Model, vocabulary: int, length: int, padded: bool
) -> tuple[Ids, int]:
    documents, words = sources.documents(source, most_bytes), functools.partial(tokens.words_of, source, most_bytes)
    return tokens.rows(tokens.encoded(documents, model, vocabulary, words), length, padded)


def _no_tokens(count: int) -> torch.Tensor:
    raise TypeError(f"{count} tokens are asked for, and this workload trains on labelled samples")


def _unheard(name: str) -> contextlib.AbstractContextManager[None]:
    del name
    return contextlib.nullcontext()


def _acts_while_running(technique: plugins.Technique) -> bool:
    """Whether a technique does something besides loading and converting: then an unchanged model is no fault."""
    stages = ("optimizer", "step_context", "training_step", "generate_options")
    return any(getattr(type(technique), stage) is not getattr(plugins.Technique, stage) for stage in stages)


def _in_a_process_of_its_own(work: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """What ``work`` returns, done in a child; JSON must have it.

    Raises:
        RuntimeError: if the child did not end well, with the last line it had to say.
        plugins.Unsuitable: if ``work`` did.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        said, code = b"", 0
        try:
            os.close(read_end)
            said = json.dumps(work()).encode()
        except plugins.Unsuitable as error:
            said, code = str(error).encode()[:4096], _UNSUITABLE
        except BaseException as error:
            said = f"{type(error).__name__}: {error}".encode()[:4096]
            code = 1
        finally:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(said)
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == _UNSUITABLE:
        raise plugins.Unsuitable(said.decode(errors="replace"))
    if code:
        raise RuntimeError(said.decode(errors="replace") or f"preparing the case ended with {code}")
    found: dict[str, list[Any]] = json.loads(said)
    return found
