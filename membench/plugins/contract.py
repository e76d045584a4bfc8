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

from membench.plugins.options import Options
from membench.plugins.storage import Storage
from membench.plugins.training import Corpus, Samples, Step, Tokens, TrainingData, TrainingStep

if TYPE_CHECKING:
    import torch
    from torch import nn


class Shape(NamedTuple):
    """The numbers that make a decoder."""

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
    """A case before anything runs: what a technique looks at to say whether it fits. No torch is needed for it."""

    model: Model
    workload: Workload
    device: str
    before: tuple[Technique, ...]
    """The members of the stack before this technique."""
    after: tuple[Technique, ...]


@dataclass(frozen=True)
class Context:
    """What a stage may ask of the harness.

    Attributes:
        part: marks a part of a step (``with context.part("prefill")``): its time and memory are kept apart.
        inventory: by category (``optimizer``, ``cache``), a function that gives whatever holds tensors of it; who
            makes such tensors registers it, so that memory can be broken down.
        scratch: a folder of the case, removed after it.
        idle: the members whose conversion changed nothing in the model. The harness finds them; a technique that
            ``applies_rest`` and calls later members itself adds those that it finds.
        diverged: what to say of a training while loading or converting whose loss became no number; the case then ends
            as ``diverged``, with all its figures.
        facts: figures that a stage found out, by metric field, each with how it was obtained.
        data: the training data as the stack stores it, where the workload reads a corpus.
        samples: what the stack draws labelled samples from, where the workload trains on some.
        rehearsal: the case is only gone through on a miniature; one step of whatever takes many is enough.
        corpus: what the workload reads, where it reads a corpus.
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


class Model(Options):
    """Builds a module and says how to feed it."""

    required: ClassVar[frozenset[str]] = frozenset({"build"})
    gives_logits: ClassVar[bool] = True
    """Whether the module takes token ids (B, T) and gives logits (B, T, vocabulary), bare or as ``.logits``."""
    quality: ClassVar[bool] = False
    """Whether the model is trained, so that its held-out bits per byte mean something."""

    @property
    def shape(self) -> Shape | None:
        """The numbers of the decoder, where they are known without building it."""
        return None

    def check(self) -> str | None:
        """What is wrong with the options, as far as it can be told without torch (then the suite is refused)."""
        return None

    def prepare(self, progress: Callable[[int, int, str], None]) -> None:
        """Do once, before anything is measured, what needs doing once (train, download)."""

    def build(self, context: Context) -> nn.Module:
        """The module on ``context.device``, ready to run, with seeded weights."""
        raise NotImplementedError

    def skeleton(self) -> nn.Module:
        """The module on the meta device: shapes without memory.

        Raises:
            NotImplementedError: where it can only be had by building it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no skeleton on the meta device")

    def miniature(self) -> Model | None:
        """A model of the same kind but of almost no size, or ``None``.

        The case is rehearsed on it before the baseline is taken, so that what libraries set up at their first call is
        not counted as the case's.
        """
        return None

    def vocabulary(self, module: nn.Module) -> int:
        """How many token ids the module knows."""
        return int(module.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def encode(self, text: bytes) -> Sequence[int] | None:
        """Token ids of a text, where the model has a tokenizer; ``None``: bytes, or words by their rank."""
        return None

    def token_ends(self, text: bytes) -> Sequence[int] | None:
        """At which byte of a text each of its token ids ends; ``None`` where the tokenizer cannot tell."""
        return None

    def max_tokens(self) -> int | None:
        """The longest sequence the model takes, if it has a limit that is known without building it."""
        return self.shape.longest if self.shape else None

    def needed_bytes(self) -> int | None:
        """Bytes that ``build`` will take, by arithmetic, or ``None`` where that is not known."""
        return None


class Technique(Options):
    """One way to save memory. A technique overrides only the stages it touches; a stack runs each stage in order."""

    acts_on: ClassVar[str] = "nothing"
    """What it saves on (weights, activations, gradients, optimizer, cache, loading, time), for ``membench list``."""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    needs: ClassVar[Mapping[str, str]] = {}
    """Modules that not everyone has, each with what to install for it: {'peft': 'membench[adapters]'}."""
    applies_rest: ClassVar[bool] = False
    """``load`` returns the module as the later members of the stack make it: they neither load nor apply it again."""
    prepares_rest: ClassVar[bool] = False
    """What ``prepare`` makes has the later members applied to it."""
    trains_adapters: ClassVar[bool] = False
    """Whether it freezes the weights and trains parameters of its own beside them."""
    needs_all_gradients: ClassVar[bool] = False
    """Whether its step wants the gradients of all parameters at once: to add them up, to unscale or to clip them."""

    def check(self, setting: Setting) -> str | None:
        """What is wrong with the options for this model or workload (then the suite is refused), or ``None``."""
        return None

    def refuse(self, setting: Setting) -> str | None:
        """Why this technique cannot serve the case (it is then skipped with this reason), or ``None``."""
        return None

    def nominal_bits(self) -> float | None:
        """Bits a weight that the technique is known for, or ``None`` where it leaves their type alone."""
        return None

    def nominal_cache_bits(self) -> float | None:
        """Bits a number of the key-value cache that the technique is known for, or ``None``."""
        return None

    def nominal_state_bytes(self) -> float | None:
        """Bytes of optimizer state for a trained parameter that the technique is known for, or ``None``."""
        return None

    def nominal_share(self) -> float | None:
        """The share of the weights that the technique is known to leave; ``None`` where it follows from the model."""
        return 1.0

    def corpus(self, documents: Sequence[bytes], context: Context) -> Sequence[bytes]:
        """The training text, document by document: fewer of them, or others. Part of the phase ``store``."""
        return documents

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        """How token ids are kept and read: replace what the technique is about."""
        return storage

    def samples(self, samples: Samples, context: Context) -> Samples:
        """What labelled samples are drawn from: fewer of them, or what makes some. Part of the phase ``store``."""
        return samples

    def prepare(self, make: Callable[[], nn.Module], context: Context) -> None:
        """Run in a process of its own before anything is measured; leave files in ``context.scratch`` for ``load``.

        Args:
            make: builds the model; where the technique ``prepares_rest``, with the later members applied.

        Raises:
            Unsuitable: where it cannot be prepared; the case is then skipped with this reason.
        """

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        """The module; ``build`` is how it would come without this technique, ``rest`` the stack's later members."""
        return build()

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        return module

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        return optimizer

    def step_context(self, context: Context) -> AbstractContextManager[Any]:
        """Entered around each forward pass (or generation), and left before the backward pass."""
        return nullcontext()

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        return step

    def generate_options(self, options: dict[str, Any], context: Context) -> dict[str, Any]:
        """Keyword arguments of the forward pass while generating; a cache goes under ``past_key_values``."""
        return options

    def remark(self, module: nn.Module, context: Context) -> str | None:
        """What went wrong without an error, known once steps have run: a compiler fell back, say."""
        return None


class Workload(Options):
    """What is done with the model. ``start`` returns a function that does one step."""

    required: ClassVar[frozenset[str]] = frozenset({"start", "longest_sequence", "tokens_per_step"})
    trains: ClassVar[bool] = False

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the model will see."""
        raise NotImplementedError

    def check(self) -> str | None:
        """What is wrong with the options, as far as it can be told without torch (then the suite is refused)."""
        return None

    def tokens_per_step(self) -> int | None:
        """Tokens that a step works through, for tokens a second; ``None``: an epoch of the data, or no tokens."""
        raise NotImplementedError

    def corpus(self) -> Corpus | None:
        """The training data that it reads; ``None``: the built-in text, from its start."""
        return None

    def samples(self) -> Samples | None:
        """The labelled samples that it trains on, before any technique; ``None``: it works on text.

        Raises:
            Unsuitable: if they cannot be had here.
        """
        return None

    def steps_in_all(self) -> int | None:
        """Steps that its training takes: what is left of them follows those that are measured. ``None``: no more."""
        return None

    def examine(self, module: nn.Module, techniques: Sequence[Technique], context: Context) -> None:
        """After all steps: what there is to find out about the trained module goes into ``context.facts``."""

    def decoded_tokens_per_step(self) -> int | None:
        """Tokens that the part ``decode`` of a step brings forth, if it has one."""
        return None

    def cached_tokens(self) -> int | None:
        """Tokens, over all sequences, whose keys and values a step's cache holds in the end, if it has one."""
        return None

    def logits(
        self, module: nn.Module, ids: torch.Tensor, techniques: Sequence[Technique], context: Context
    ) -> torch.Tensor:
        """Logits (T, vocabulary) of held-out token ids (T,), read as this workload has the module read them."""
        output = module(ids[None])
        logits: torch.Tensor = getattr(output, "logits", output)[0]
        return logits

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        """Prepare (optimizer, batch) and return the step, which enters ``stepping`` around each forward pass."""
        raise NotImplementedError


@contextmanager
def stepping(techniques: Sequence[Technique], context: Context) -> Iterator[None]:
    """The contexts that a stack's members want a forward pass to run in."""
    with ExitStack() as stack:
        for technique in techniques:
            stack.enter_context(technique.step_context(context))
        yield
