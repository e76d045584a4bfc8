"""Assembly of a case in the worker: its plug-ins, its training data, its rehearsal and its module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench import plugins
from membench.data import corpus, sources, tokens
from membench.data.dataset import Dataset
from membench.data.epochs import endless
from membench.data.layouts import Integers
from membench.data.samples import StoredSamples
from membench.data.shards import Shards
from membench.host.device import Device
from membench.plugins import registry
from membench.plugins.ranks import ORDER
from membench.plugins.replacing import LeftAlone
from membench.plugins.storage import Storage
from membench.protocol.case import Plugin
from membench.protocol.requests import MeasureCase, Rank
from membench.worker import converted_layers, weight_uses
from membench.worker.child_process import run_in_child
from membench.worker.fitting import refuse_what_cannot_load
from membench.worker.notes import PlainWeights
from membench.worker.plugin_values import Facts
from membench.worker.rehearsal_model import RehearsalModel
from membench.worker.weights import fingerprint, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.plugins.storage import Ids


_REHEARSED_BYTES = 2**17


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The plug-ins of a case.

    Attributes:
        names: the members of the stack, as written in the suite.
        metrics: the custom quality metrics, by field.
        model_name: the name of the model in the suite.
        aside: returns a context manager for work of the harness's own, which is left out of what is measured.
    """

    model: plugins.Model
    techniques: tuple[plugins.Technique, ...]
    workload: plugins.Workload
    names: tuple[str, ...]
    context: plugins.Context
    metrics: Mapping[str, plugins.QualityMetric] = dataclasses.field(default_factory=dict)
    model_name: str | None = None
    aside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @classmethod
    def of(
        cls,
        request: MeasureCase,
        rank: Rank,
        scratch: Path,
        part: Callable[[str], contextlib.AbstractContextManager[None]],
        aside: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> Assembly:
        """Create the plug-ins that a request names.

        Args:
            rank: this process among the ranks of the case.
            scratch: the folder for files of this case.
            part: returns a context manager that marks a part of a step.
            aside: the attribute.

        Raises:
            plugins.Unsuitable: if a technique cannot be applied to the case, or needs a library that is not installed.
        """
        model, workload = create("model", request.model), create("workload", request.workload)
        techniques = tuple(create("technique", named) for named in request.techniques)
        for position, technique in enumerate(techniques):
            for module, distribution in technique.needs.items():
                if importlib.util.find_spec(module) is None:
                    raise plugins.Unsuitable(f"'{module}' is not installed: pip install '{distribution}'")
            before, after = techniques[:position], techniques[position + 1 :]
            ranks = rank.of if rank.is_one_of_several else None
            reason = technique.refuse(plugins.Setting(model, workload, rank.device, before, after, ranks))
            if reason:
                raise plugins.Unsuitable(reason)
        context = plugins.Context(
            rank.device, request.seed, model, part, {}, scratch, facts=Facts(), corpus=workload.corpus()
        )
        metrics = {field: create("metric", named) for field, named in request.metrics.items()}
        members = tuple(request.members)
        return cls(model, techniques, workload, members, context, metrics, request.model_name, aside)

    def name_of(self, plugin: object) -> str:
        """Return the kind and the name of a plug-in of the case for a message."""
        for name, technique in zip(self.names, self.techniques, strict=True):
            if technique is plugin:
                return f"technique '{name}'"
        if plugin is self.model and self.model_name is not None:
            return f"model '{self.model_name}'"
        kind = {id(self.workload): "workload", id(self.model): "model"}.get(id(plugin))
        return f"{kind} '{type(plugin).__name__}'" if kind else "a plug-in"

    def spread(self, ranks: plugins.Ranks) -> Assembly:
        """Return the case on one of several ranks."""
        return dataclasses.replace(self, context=dataclasses.replace(self.context, ranks=ranks))

    def rehearsed(self) -> Assembly | None:
        """Return the same case with a tiny model: the model's own miniature, or a generic one. Nothing is measured.

        ``None`` if the model has no miniature and gives no logits, since no generic model can then replace it.
        """
        miniature = self.model.miniature() or (RehearsalModel() if self.model.gives_logits else None)
        if miniature is None:
            return None
        scratch = self.context.scratch / "rehearsal"
        scratch.mkdir(exist_ok=True)
        context = dataclasses.replace(
            self.context, model=miniature, part=_unmeasured, inventory={}, scratch=scratch, idle=[], diverged=[],
            left_alone=[], lost=[], facts={}, rehearsal=True,
        )  # fmt: skip
        return dataclasses.replace(self, model=miniature, context=context, aside=contextlib.nullcontext)

    @property
    def applied(self) -> list[plugins.Technique]:
        """Return the members whose ``load`` and ``apply`` are called here: all up to the first that ``applies_rest``.

        That member applies the later ones itself.
        """
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
        """Apply the techniques to a module; members that change nothing in it are added to ``context.idle``.

        A member that was to split it over ranks and left it whole has changed nothing, either.
        """
        for technique, stage in self.conversions():
            with self.aside():
                before, before_bytes = fingerprint(module), weight_bytes(module)
                own = converted_layers.OwnLayers(module)
            module = stage(module)
            with self.aside():
                if isinstance(technique, plugins.Parallel):
                    is_idle = technique.splits_model and weight_bytes(module) >= before_bytes
                else:
                    is_idle = fingerprint(module) == before
                    self.context.lost.extend(own.lost(module, technique))
                if is_idle:
                    self.context.idle.append(technique)
        return module

    def conversions(self) -> Iterator[tuple[plugins.Technique, Callable[[nn.Module], nn.Module]]]:
        """Yield what converts a module, with the member that it is of: ``apply`` of all, then ``parallelize``."""
        for technique in self.applied:
            if type(technique).apply is not plugins.Technique.apply:
                yield technique, functools.partial(self._stage, technique, "apply")
        if self.context.ranks:
            members = [each for each in self.techniques if isinstance(each, plugins.Parallel)]
            for member in sorted(members, key=lambda each: ORDER.index(each.dimension)):
                yield member, functools.partial(self._stage, member, "parallelize")

    def _stage(self, technique: plugins.Technique, name: str, module: nn.Module) -> nn.Module:
        returned = getattr(technique, name)(module, self.context)
        return plugins.given_back(returned, technique, name, "module")

    def make(self) -> nn.Module:
        """Load the module and apply the techniques."""
        return self.apply(self.load())

    def watched(self) -> Assembly:
        """Return the case with the knowledge of who uses layers' weights, if a technique of it replaces layers."""
        if not any(isinstance(each, plugins.SelectsLayers) and not each.keeps_layers for each in self.techniques):
            return self
        uses = weight_uses.find(self.model, self.workload, self.context) if self.workload.samples() is None else None
        return dataclasses.replace(self, context=dataclasses.replace(self.context, weight_uses=uses))

    def read_text(self) -> None:
        """Read and encode the text before the baseline is taken, since the text belongs to the harness."""
        corpus.read()
        self.model.encode(corpus.split()[0])
        self.workload.samples()
        if (spec := self.workload.corpus()) is None:
            return
        sources.documents(spec.source, spec.most_bytes)
        with contextlib.suppress(NotImplementedError):  # without a skeleton, the vocabulary is known only after loading
            vocabulary = self.model.vocabulary(self.model.skeleton())
            if are_words := tokens.are_words(self.model, vocabulary):
                tokens.replaced_in(spec.source, spec.most_bytes)
            if not self._changes_corpus:
                self._rows(spec, vocabulary)
            elif are_words:
                tokens.words_of(spec.source, spec.most_bytes)

    def notes_on_text(self, module: nn.Module) -> list[str]:
        """Return a note if parts of the corpus are not valid text and were replaced."""
        spec = self.workload.corpus()
        if spec is None or not tokens.are_words(self.model, self.model.vocabulary(module)):
            return []
        count = tokens.replaced_in(spec.source, spec.most_bytes)
        return [f"not UTF-8, and read as U+FFFD: {count:,} bytes or cut-off characters of the text"] if count else []

    def digest(self) -> str:
        """Return a hash of the workload's text, before any technique changes it."""
        spec = self.workload.corpus()
        return corpus.digest() if spec is None else sources.digest(spec.source, spec.most_bytes)

    @property
    def _changes_corpus(self) -> bool:
        return any(type(technique).corpus is not plugins.Technique.corpus for technique in self.techniques)

    def _rows(self, spec: plugins.Corpus, vocabulary: int) -> tuple[Ids, int]:
        """Return the rows of token ids, and the number of padding tokens in them."""
        most_bytes, padded = spec.most_bytes, self._storage().padded
        if self.context.rehearsal:
            most_bytes = min(_REHEARSED_BYTES, most_bytes or _REHEARSED_BYTES)
        if not self._changes_corpus:
            return _rows_of(spec.source, most_bytes, self.model, vocabulary, spec.length, padded)
        found = sources.documents(spec.source, most_bytes)
        for technique in self.techniques:
            found = plugins.given_back(technique.corpus(found, self.context), technique, "corpus", "documents")
        words = functools.partial(tokens.words_of, spec.source, spec.most_bytes)
        return tokens.rows(tokens.encoded(found, self.model, vocabulary, words), spec.length, padded)

    def _storage(self) -> Storage:
        storage = Storage(Shards(), Integers("int64"))
        for technique in self.techniques:
            returned = technique.data_storage(storage, self.context)
            storage = plugins.given_back(returned, technique, "data_storage", "storage")
        return storage

    def store(self, module: nn.Module) -> Assembly:
        """Store the training data as the stack specifies, and read them once to check them.

        Returns:
            the case with the stored data in its context.

        Raises:
            plugins.Unsuitable: if the data are too few for one batch.
        """
        if (samples := self.workload.samples()) is not None:
            return self._store_samples(samples)
        spec = self.workload.corpus()
        if spec is None:
            return self
        vocabulary = self.model.vocabulary(module)
        rows, padding = self._rows(spec, vocabulary)
        if len(rows) < spec.batch_size:
            raise plugins.Unsuitable(
                f"the data give {len(rows)} rows of {spec.length} tokens, and a batch needs {spec.batch_size}"
            )
        folder, storage = self.context.scratch / "data", self._storage()
        with self.context.part("compress") if storage.codec else contextlib.nullcontext():
            data = Dataset.written(rows, storage, vocabulary, folder, padding)
        # A technique's own facts take precedence: for generated data, the generator is stored and not its output.
        self.context.facts.update(data.facts() | self.context.facts)
        return dataclasses.replace(self, context=dataclasses.replace(self.context, data=data))

    def _store_samples(self, samples: plugins.Samples) -> Assembly:
        if isinstance(samples, StoredSamples):
            samples = samples.copied()  # the originals were read before the baseline and belong to the harness
        for technique in self.techniques:
            samples = plugins.given_back(technique.samples(samples, self.context), technique, "samples", "samples")
        self.context.facts["data_bytes"] = (samples.kept_bytes, "bytes of what samples are drawn from, as it is kept")
        return dataclasses.replace(self, context=dataclasses.replace(self.context, samples=samples))

    def tokens(self, module: nn.Module) -> plugins.Tokens:
        """Return the source of training tokens: batches of the stored data, or else the text from its start."""
        import torch

        if self.context.samples is not None:
            return _no_tokens
        if (data := self.context.data) is not None and (spec := self.workload.corpus()) is not None:
            batches = endless(data, spec.batch_size, self.context.seed, spec.workers)
            return lambda count: next(batches).flatten().to(torch.int64)
        vocabulary = self.model.vocabulary(module)
        encoded = self.model.encode(corpus.split()[0])
        following = corpus.stream(corpus.ids(vocabulary) if encoded is None else encoded, vocabulary)
        return lambda count: torch.tensor(following(count), dtype=torch.long)

    def prepare(self, ranks: int = 1) -> None:
        """Let techniques prepare their files, each in a forked process, so that no memory of it remains in this one.

        It must be called before this process starts threads, because a fork does not copy them.

        Args:
            ranks: how many prepare at the same time.

        Raises:
            RuntimeError: if that process fails; the message is its error.
            plugins.DoesNotFit: if memory does not suffice for preparing, or for loading afterwards.
            plugins.Unsuitable: if a technique cannot be applied to the case.
        """
        # Last to first: a technique that prepares the rest of the stack needs the files that the rest prepared.
        for position, technique in reversed(list(enumerate(self.techniques))):
            if type(technique).prepare is not plugins.Technique.prepare:
                rest = self.techniques[position + 1 :] if technique.prepares_rest else ()
                found = run_in_child(functools.partial(self._prepare_one, technique, rest, ranks))
                self.context.idle.extend(rest[place] for place in found["idle"])
                self.context.diverged.extend(found["diverged"])
                for kind in ("left_alone", "lost"):
                    told = (LeftAlone(rest[place], *what) for place, *what in found[kind])
                    getattr(self.context, kind).extend(told)

    def _prepare_one(
        self, technique: plugins.Technique, rest: Sequence[plugins.Technique], ranks: int
    ) -> dict[str, list[Any]]:
        """Let one technique prepare its files.

        Returns:
            the positions in ``rest`` of the techniques that changed nothing (``idle``), messages on trainings that
            diverged (``diverged``), and layers that were left alone (``left_alone``) or dropped (``lost``), each with
            the position of the technique.
        """
        import torch

        def prepare(assembly: Assembly) -> None:
            names = tuple(map(str, range(len(rest))))
            made = dataclasses.replace(
                assembly, techniques=tuple(rest), names=names, aside=contextlib.nullcontext
            )  # fmt: skip
            technique.prepare(made.make, assembly.context)

        if not Device.parse(self.context.device).on_gpu:
            refuse_what_cannot_load(self.model, self.techniques, self.context.device, ranks)
        rehearsed = self.rehearsed()
        if rehearsed is not None:
            with contextlib.suppress(Exception):  # a failing rehearsal is not an error; see ``rehearsing``
                prepare(rehearsed)
        torch.manual_seed(self.context.seed)  # the measured process does the same before it loads the model
        prepare(self)
        idle = [place for place, member in enumerate(rest) if any(member is each for each in self.context.idle)]
        told = {
            kind: [
                (place, layer.path, layer.reason)
                for place, member in enumerate(rest)
                for layer in layers
                if converted_layers.belongs_to(layer, member)
            ]
            for kind, layers in (("left_alone", self.context.left_alone), ("lost", self.context.lost))
        }
        return {"idle": idle, "diverged": self.context.diverged, **told}

    def plain_weights(self) -> PlainWeights | None:
        """Return the size of the model's weights without techniques; ``None`` if it has no skeleton."""
        try:
            return PlainWeights.of(self.model.skeleton())
        except Exception:  # the model cannot be built from shapes alone
            return None


def create(kind: str, named: Plugin) -> Any:
    """Create a plug-in that a request names.

    Raises:
        PluginError: if it does not exist, or if its file has changed since the suite was read.
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


def _unmeasured(name: str) -> contextlib.AbstractContextManager[None]:
    del name
    return contextlib.nullcontext()
