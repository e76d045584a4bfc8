"""The plug-in contract: the base classes of models, techniques, workloads and quality metrics, with their defaults.

``membench list contract`` prints it on one screen. A plug-in's module must not import torch when it is loaded: the
runner reads its options without it. Import torch in the methods; they run in the measured process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from membench.plugins.storage import Storage
from membench.units import parse_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.data.dataset import Dataset
    from membench.data.samples import Samples

CONTRACT_VERSION = 1
"""History: 1, the first."""
PROMISE = """\
Promise: within one CONTRACT_VERSION nothing here, nor an argument or field of what is passed, is removed, renamed,
reordered or given another meaning; new stages have defaults. A plug-in that states the version it was written for
(contract: ClassVar[int]) is refused by any other version instead of being run wrongly; the CHANGELOG says what to
change."""

_T = TypeVar("_T")


def _parsed(size: object) -> object:
    return parse_bytes(size) if isinstance(size, str) else size


ByteCount = Annotated[int, BeforeValidator(_parsed)]
"""The type of an option that is a size: bytes, or text such as '8 MiB'."""


class Options(BaseModel):
    """What every plug-in is: typed options, a docstring whose first line is shown by ``membench list``."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    contract: ClassVar[int] = CONTRACT_VERSION
    """The version of the contract that the plug-in was written for, where it says so."""
    required: ClassVar[frozenset[str]] = frozenset()
    """Stages that have no default."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names after the plug-in's own: preset '60m' of 'llama' is written 'llama-60m'."""
    imports: ClassVar[tuple[str, ...]] = ("torch",)
    """Modules the fork server imports once, so that no case pays for them."""


class Unsuitable(Exception):
    """Raised by a stage that finds that it cannot serve the case; the case is skipped, and this is the reason."""


class DoesNotFit(Exception):
    """Arithmetic says that a case needs more memory than there is."""


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
        data: the training data as the stack keeps them, where the workload reads a corpus.
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
    data: Dataset | None = None
    samples: Samples | None = None
    rehearsal: bool = False
    corpus: Corpus | None = None


Step: TypeAlias = "Callable[[], torch.Tensor | None]"
"""Does one step; a training step returns its loss (a scalar, detached)."""

Tokens: TypeAlias = "Callable[[int], torch.Tensor]"
"""The next so many token ids of the text: (count,), int64, on the CPU."""


@dataclass
class TrainingStep:
    """The pieces of a training step, each replaceable by a technique.

    Attributes:
        split: of a step's batch of token ids (B, T): the runs of its rows that forward and backward go through one
            after the other, their gradients adding up.
        loss: of (module, such rows): the mean cross entropy of their next tokens, a scalar.
        backward: of the loss, weighted by the rows' share of the batch.
    """

    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]
    zero_grad: Callable[[], None]


class Corpus(NamedTuple):
    """Training data that a workload reads: from where, how much, in what rows, batches and processes."""

    source: str
    most_bytes: int | None
    length: int
    batch_size: int
    workers: int


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


class LayerWise(Technique):
    """A technique that converts one layer after the other, and so can be streamed from a checkpoint."""

    required: ClassVar[frozenset[str]] = frozenset({"convert"})

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        """What takes the place of ``layer``, or ``layer`` itself, changed or as it is.

        Args:
            name: its path in the model.
            layer: a module that owns parameters directly; its children are not to be touched.
            head: the model's output head, if it has one: some techniques leave it alone.
        """
        raise NotImplementedError

    def for_rehearsal(self, context: Context) -> Self:
        """This technique, or in a rehearsal one of the same kind whose options fit the miniature."""
        return self

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        head, technique = output_head(module), self.for_rehearsal(context)
        for name, layer in [(n, child) for n, child in module.named_modules() if child._parameters]:
            converted = given_back(technique.convert(name, layer, head), self, "convert", "layer")
            module = replaced(module, name, converted)
        return module


def output_head(module: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the module says which it is."""
    found: nn.Module | None = getattr(module, "get_output_embeddings", lambda: None)()
    return found


def replaced(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """``module`` with the layer at a path exchanged; the layer itself where the path is that of the root."""
    if not name:
        return layer
    where, _, last = name.rpartition(".")
    if getattr(module.get_submodule(where), last) is not layer:
        setattr(module.get_submodule(where), last, layer)
    return module


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


class HeldOut(NamedTuple):
    """Text that the model was not trained on.

    Attributes:
        pieces: runs of token ids, the first of each given and the others to be predicted.
        logits: of token ids (T,), int64, on the case's device: logits (T, vocabulary), as the workload has the module
            read them, with the stack's contexts around it.
        reference: of a piece, by its number: the reference's logits of all tokens but the last (T - 1, vocabulary),
            fp32, on the case's device; raises ``Unsuitable`` where they are not kept.
    """

    pieces: Sequence[Sequence[int]]
    logits: Callable[[torch.Tensor], torch.Tensor]
    reference: Callable[[int], torch.Tensor]


class QualityMetric(Options):
    """A figure of how good the converted model is, taken in the phase ``evaluate``."""

    required: ClassVar[frozenset[str]] = frozenset({"measure"})
    unit: ClassVar[str] = ""
    """What follows the number: '%', 'nats'."""
    better: ClassVar[Literal["lower", "higher"]] = "lower"

    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        """The figure of a module that is in its mode of evaluation, without gradients; leave the module as it is.

        Raises:
            Unsuitable: where it cannot be had of this case; the reason stands in the record.
        """
        raise NotImplementedError


CONTRACT_CLASSES: frozenset[type] = frozenset({Options, Model, Technique, LayerWise, Workload, QualityMetric})


def given_back(returned: _T | None, plugin: Options, method: str, wanted: str) -> _T:
    """What a method that changes something returned.

    Raises:
        TypeError: if that is nothing: it forgot to give it back.
    """
    if returned is None:
        raise TypeError(f"'{method}' of {type(plugin).__name__} returned nothing; end it with 'return {wanted}'")
    return returned


@contextmanager
def stepping(techniques: Sequence[Technique], context: Context) -> Iterator[None]:
    """The contexts that a stack's members want a forward pass to run in."""
    with ExitStack() as stack:
        for technique in techniques:
            stack.enter_context(technique.step_context(context))
        yield
