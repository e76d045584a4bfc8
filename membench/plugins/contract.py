"""The plug-in contract: the base classes of models, techniques and workloads, and what the harness passes to them.

They are in one file because they refer to each other: a technique asks about the case's model and workload, and a
workload runs the steps of techniques. ``membench list contract`` prints the whole contract on one screen. A plug-in's
module must not import torch when it is loaded: the runner reads its options without it. Import torch in the methods;
they run in the measured process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from membench.plugins.logits import logits_of
from membench.plugins.options import Options
from membench.plugins.ranks import Ranks
from membench.plugins.replacing import LeftAlone, WeightUse
from membench.plugins.storage import Storage
from membench.plugins.training import Corpus, Samples, Step, Tokens, TrainingData, TrainingStep

if TYPE_CHECKING:
    import torch
    from torch import nn


class Shape(NamedTuple):
    """The dimensions of a decoder."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    inner_width: int
    vocabulary: int
    longest: int
    tied: bool


@dataclass(frozen=True)
class Setting:
    """A case before anything runs, from which a technique tells whether it can serve it. Needs no torch."""

    model: Model
    workload: Workload
    device: str
    before: tuple[Technique, ...]
    """The members of the stack before this technique."""
    after: tuple[Technique, ...]
    ranks: int | None = None
    """How many ranks the case runs on, where its device has a count (``2xcpu``); ``device`` is that of one rank."""


@dataclass(frozen=True)
class Context:
    """What the harness offers to a stage.

    Attributes:
        part: marks a part of a step (``with context.part("prefill")``), whose time and memory are recorded separately.
        inventory: functions that return the holders of tensors of a category (``optimizer``, ``cache``), by category;
            whoever makes such tensors registers one, so that memory can be broken down.
        scratch: a folder of the case, removed after it.
        idle: the members whose conversion changed nothing in the model. The harness finds them; a technique that
            ``applies_rest`` and calls later members itself adds those that it finds.
        diverged: messages about trainings while loading or converting whose loss was not finite; the case then ends
            as ``diverged``, with all its metrics.
        facts: values that a stage measured, by metric field, each with how it was obtained.
        data: the training data as the stack stores it, where the workload reads a corpus.
        samples: the labelled samples of the stack, where the workload trains on some.
        rehearsal: whether the case is only rehearsed on a miniature; then do one step of whatever takes many.
        corpus: the corpus that the workload reads, if it reads one.
        weight_uses: by path of a layer, who uses its weight besides the layer; ``None``: not known. See ``LayerWise``.
        left_alone: layers that a technique would have converted, had they not something of their own to lose.
        lost: such layers that a technique replaced all the same. The harness finds them.
        ranks: the ranks of the case, if it runs on several devices (``2xcpu``).
    """

    device: str
    seed: int
    model: Model
    part: Callable[[str], AbstractContextManager[None]]
    inventory: dict[str, Callable[[], Any]]
    scratch: Path
    idle: list[Technique] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    facts: dict[str, tuple[float, str]] = field(default_factory=dict)
    data: TrainingData | None = None
    samples: Samples | None = None
    rehearsal: bool = False
    corpus: Corpus | None = None
    weight_uses: Mapping[str, WeightUse] | None = None
    left_alone: list[LeftAlone] = field(default_factory=list)
    lost: list[LeftAlone] = field(default_factory=list)
    ranks: Ranks | None = None


class Model(Options):
    """Builds a module and describes its inputs."""

    required: ClassVar[frozenset[str]] = frozenset({"build"})
    gives_logits: ClassVar[bool] = True
    """Whether the module maps token ids (B, T) to logits (B, T, vocabulary), in any form that ``logits_of`` takes."""
    quality: ClassVar[bool] = False
    """Whether the model is trained, so that its held-out bits per byte are meaningful."""

    @property
    def shape(self) -> Shape | None:
        """The dimensions of the decoder, if they are known without building it."""
        return None

    def check(self) -> str | None:
        """Return what is wrong with the options, as far as is known without torch (the suite is then refused)."""
        return None

    def verify(self) -> str | None:
        """Return what is wrong with the options as only torch can tell, or ``None``.

        It runs in a process of its own before anything is measured; the run is then refused, as by ``check``.
        """
        return None

    def prepare(self, progress: Callable[[int, int, str], None]) -> None:
        """Do one-off work, such as training or downloading, before anything is measured."""

    def unsuitable(self, workload: Workload) -> str | None:
        """Return why a workload makes no sense with the model (the case is then skipped with this reason), or ``None``.

        It runs in the measured process, before anything is measured.
        """
        return None

    def unjudged(self) -> str | None:
        """Return why the held-out loss says nothing about the model although it is trained (``quality``), or ``None``.

        It runs in the measured process, when quality is measured.
        """
        return None

    def build(self, context: Context) -> nn.Module:
        """Return the module on ``context.device``, ready to run, with seeded weights."""
        raise NotImplementedError

    def skeleton(self) -> nn.Module:
        """Return the module on the meta device: shapes without memory.

        Raises:
            NotImplementedError: if it is known only after building it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no skeleton on the meta device")

    def miniature(self) -> Model | None:
        """Return a very small model of the same kind, or ``None``.

        The case is rehearsed on it before the baseline is taken, so that what libraries set up at their first call is
        not counted as the case's.
        """
        return None

    def depth(self) -> int | None:
        """Return the number of its layers, if all of them are alike; ``None`` if not, or if it is not known.

        What a deep model needs is then estimated from ``with_depth`` of few layers.
        """
        return None

    def with_depth(self, layers: int) -> Model:
        """Return the same model with so many of its layers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how deep it is")

    def vocabulary(self, module: nn.Module) -> int:
        """Return the size of the module's vocabulary."""
        return int(module.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def encode(self, text: bytes) -> Sequence[int] | None:
        """Return the token ids of a text, or ``None`` without a tokenizer: then bytes, or words by rank, are used."""
        return None

    def token_ends(self, text: bytes) -> Sequence[int] | None:
        """Return the byte offset at which each token of a text ends; ``None`` if the tokenizer cannot tell."""
        return None

    def max_tokens(self) -> int | None:
        """Return the longest sequence that the model takes, if a limit is known without building it."""
        return self.shape.longest if self.shape else None

    def needed_bytes(self) -> int | None:
        """Return the bytes that ``build`` will need, by arithmetic, or ``None`` if unknown."""
        return None


class Technique(Options):
    """One way to save memory. A technique overrides the stages that it changes; a stack runs each stage in order."""

    acts_on: ClassVar[str] = "nothing"
    """What it saves (weights, activations, gradients, optimizer, cache, loading, time), for ``membench list``."""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    needs: ClassVar[Mapping[str, str]] = {}
    """Optional modules that it imports, each with what to install for it: {'peft': 'membench[adapters]'}."""
    applies_rest: ClassVar[bool] = False
    """Whether ``load`` also applies the later members of the stack, which then neither load nor apply again."""
    prepares_rest: ClassVar[bool] = False
    """Whether ``prepare`` gets the model with the later members applied."""
    trains_adapters: ClassVar[bool] = False
    """Whether it freezes the weights and trains additional parameters."""
    needs_all_gradients: ClassVar[bool] = False
    """Whether its step needs the gradients of all parameters at once: to add, unscale or clip them."""
    warmup_steps: ClassVar[int] = 1
    """How many steps it takes until memory no longer changes from step to step."""

    def check(self, setting: Setting) -> str | None:
        """Return what is wrong with the options for this model or workload (the suite is then refused), or ``None``."""
        return None

    def refuse(self, setting: Setting) -> str | None:
        """Return why this technique cannot serve the case (which is then skipped with this reason), or ``None``."""
        return None

    def nominal_bits(self) -> float | None:
        """Return the nominal bits per weight, or ``None`` if the type of the weights stays."""
        return None

    def nominal_cache_bits(self) -> float | None:
        """Return the nominal bits per number of the key-value cache, or ``None``."""
        return None

    def nominal_state_bytes(self) -> float | None:
        """Return the nominal bytes of optimizer state per trained parameter, or ``None``."""
        return None

    def computing_bits(self) -> float | None:
        """Return the bits of the coarsest numbers that it makes steps compute with or keep; ``None``: as without it."""
        return self.nominal_bits()

    def nominal_share(self) -> float | None:
        """Return the nominal share of the weights that remains; ``None`` if it depends on the model."""
        return 1.0

    def corpus(self, documents: Sequence[bytes], context: Context) -> Sequence[bytes]:
        """Return the documents of the training text, fewer or others. Runs in the phase ``store``."""
        return documents

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        """Return how token ids are stored and read, with what the technique changes replaced."""
        return storage

    def samples(self, samples: Samples, context: Context) -> Samples:
        """Return the source of labelled samples: fewer samples, or a generator. Runs in the phase ``store``."""
        return samples

    def prepare(self, make: Callable[[], nn.Module], context: Context) -> None:
        """Run in a separate process before anything is measured; leave files in ``context.scratch`` for ``load``.

        Args:
            make: builds the model; if the technique ``prepares_rest``, with the later members applied.

        Raises:
            Unsuitable: if it cannot be prepared; the case is then skipped with this reason.
        """

    def loading_bytes(self, weights_bytes: int, rest: Sequence[Technique]) -> int | None:
        """Return the bytes that ``load`` surely takes of a model that needs so many to build; ``None``: unknown."""
        return None

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        """Return the module.

        Args:
            build: builds it as without this technique.
            rest: the later members of the stack.
        """
        return build()

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        return module

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        return optimizer

    def step_context(self, context: Context) -> AbstractContextManager[Any]:
        """Return a context that is entered around each forward pass or generation and left before the backward."""
        return nullcontext()

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        return step

    def generate_options(self, options: dict[str, Any], context: Context) -> dict[str, Any]:
        """Return keyword arguments of the forward pass while generating; a cache is passed as ``past_key_values``."""
        return options

    def remark(self, module: nn.Module, context: Context) -> str | None:
        """Return what went wrong without an error once steps have run, such as a compiler's fallback."""
        return None


class Workload(Options):
    """Runs the model. ``start`` returns a function that does one step."""

    required: ClassVar[frozenset[str]] = frozenset({"start", "longest_sequence", "tokens_per_step"})
    trains: ClassVar[bool] = False

    def longest_sequence(self) -> int:
        """Return the length of the longest sequence that the model gets, in tokens."""
        raise NotImplementedError

    def check(self) -> str | None:
        """Return what is wrong with the options, as far as is known without torch (the suite is then refused)."""
        return None

    def tokens_per_step(self) -> int | None:
        """Return the tokens of a step, for tokens per second; ``None``: an epoch of the data, or no tokens."""
        raise NotImplementedError

    def corpus(self) -> Corpus | None:
        """Return the training data that it reads; ``None``: the built-in text, from its start."""
        return None

    def samples(self) -> Samples | None:
        """Return the labelled samples that it trains on, before any technique; ``None``: it works on text.

        Raises:
            Unsuitable: if they are not available here.
        """
        return None

    def steps_in_all(self) -> int | None:
        """Return the steps of its whole training; the rest follow the measured steps. ``None``: there are no more."""
        return None

    def examine(self, module: nn.Module, techniques: Sequence[Technique], context: Context) -> None:
        """Examine the trained module after all steps; results go into ``context.facts``."""

    def decoded_tokens_per_step(self) -> int | None:
        """Return the tokens that the part ``decode`` of a step generates, if it has one."""
        return None

    def cached_tokens(self) -> int | None:
        """Return the tokens, over all sequences, in a step's key-value cache at its end, if it has one."""
        return None

    def logits(
        self, module: nn.Module, ids: torch.Tensor, techniques: Sequence[Technique], context: Context
    ) -> torch.Tensor:
        """Return logits (T, vocabulary) of held-out token ids (T,), computed as this workload runs the module."""
        return logits_of(module(ids[None]), ids[None])[0]

    def check_output(self, module: nn.Module, ids: torch.Tensor) -> int:
        """Run the module on token ids (B, T) before anything is measured; return the vocabulary of its logits.

        Raises:
            WrongOutput: if what it returns does not hold the logits that this workload uses.
            Unsuitable: if this workload cannot run it; the case is then skipped with this reason.
        """
        return logits_of(module(ids), ids).shape[-1]

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        """Prepare (optimizer, batch) and return the step, which enters ``stepping`` around each forward pass."""
        raise NotImplementedError


@contextmanager
def stepping(techniques: Sequence[Technique], context: Context) -> Iterator[None]:
    """Enter the step contexts of all members of a stack around a forward pass."""
    with ExitStack() as stack:
        for technique in techniques:
            stack.enter_context(technique.step_context(context))
        yield
