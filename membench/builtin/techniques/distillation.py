"""A smaller student in the model's place, taught by it or trained alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from membench.builtin.techniques import decoder_config
from membench.builtin.techniques.activations import Checkpointing
from membench.builtin.techniques.compiling import Compile
from membench.builtin.techniques.decoder_layers import the_layer_list
from membench.builtin.techniques.inner_training import tune
from membench.builtin.workloads.generate import is_encoder_decoder
from membench.builtin.workloads.train import next_token_loss, predicts_masked_tokens
from membench.errors import PluginError
from membench.plugins import Context, Model, Setting, Shape, Technique, Unsuitable, logits_of, registry
from membench.plugins.replacing import reason_to_keep

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Student(Technique):
    """What ``distill`` and ``from-scratch`` share: with equal options, the same student and the same batches."""

    imports = ("torch", "transformers.models.auto.modeling_auto")
    acts_on: ClassVar[str] = "weights, activations, cache"
    lost: ClassVar[str]
    """What is said where an earlier member ``loses``."""
    layers: int | None = Field(None, ge=1)
    """Layers of the student. With neither layers, width nor student: half of the teacher's."""
    width: float = Field(1.0, gt=0, le=1)
    """Share of the teacher's width, rounded to whole heads of the teacher's size; the inner width follows."""
    student: str | None = None
    """A smaller model of membench with the teacher's vocabulary, such as 'llama-15m', not layers and width."""
    steps: int = Field(300, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    text_tokens: int | None = Field(None, ge=256)
    """How much of the training text there is to learn from; all of it by default."""
    seed: int = Field(0, ge=0)
    """Of the first weights and of the batches, added to the suite's own."""

    def check(self, setting: Setting) -> str | None:
        teacher = setting.model.shape
        if self.student is not None:
            if self.layers is not None or self.width < 1:
                return f"student = '{self.student}' has layers and width of its own: leave those options out"
            try:
                named = self._named(self.student)
            except PluginError as error:
                return f"student: {error}"
            if teacher and named.shape and named.shape.vocabulary != teacher.vocabulary:
                return _other_vocabulary(self.student, named.shape.vocabulary, teacher.vocabulary)
            if teacher and named.shape and _matrix_weights(named.shape) >= _matrix_weights(teacher):
                return (
                    f"student = '{self.student}' is no smaller than its teacher: {_size(named.shape)}, "
                    f"where the teacher has {_size(teacher)}"
                )
            return None
        if teacher is None:
            return None
        if self.layers is not None and self.layers > teacher.layers:
            return f"layers = {self.layers}: the teacher has {teacher.layers}"
        if self.reduced(teacher) == teacher:
            return "the student would be as large as its teacher: give fewer layers or less width"
        return None

    def refuse(self, setting: Setting) -> str | None:
        lost = any(self.loses(technique) for technique in setting.before)
        return self.lost if lost else None

    def loses(self, technique: Technique) -> bool:
        """Whether what an earlier member did to the model is lost with it, as if that member were not there."""
        raise NotImplementedError

    def nominal_share(self) -> float | None:
        return None

    def prepare(self, make: Callable[[], nn.Module], context: Context) -> None:
        if self.student is not None:
            self._named(self.student).prepare(lambda done, total, what: None)

    def reduced(self, teacher: Shape) -> Shape:
        """The student's shape: heads stay as large as they are, groups of query heads stay even."""
        heads = max(1, round(teacher.heads * self.width))
        wanted = max(1, round(teacher.key_value_heads * self.width))
        key_value_heads = max(count for count in range(1, wanted + 1) if heads % count == 0)
        layers = self.layers
        if layers is None:
            layers = teacher.layers if self.width < 1 else (teacher.layers + 1) // 2
        return teacher._replace(
            width=teacher.width // teacher.heads * heads,
            layers=min(layers, teacher.layers),
            heads=heads,
            key_value_heads=key_value_heads,
            inner_width=max(1, round(teacher.inner_width * heads / teacher.heads)),
        )

    def untrained(self, teacher: nn.Module, context: Context) -> nn.Module:
        """The student with seeded weights, in fp32.

        Raises:
            Unsuitable: if the teacher has no configuration to derive it from, or another vocabulary.
        """
        import torch
        from transformers import AutoModelForCausalLM

        if predicts_masked_tokens(type(teacher)) or is_encoder_decoder(teacher):
            raise Unsuitable(
                f"a student learns to predict next tokens, and a {type(teacher).__name__} does not do that"
            )
        context = self.seeded(context)
        if self.student is not None:
            named = self._named(self.student)
            if context.rehearsal:
                named = named.miniature() or named
            module = named.build(context)
            vocabularies = named.vocabulary(module), context.model.vocabulary(teacher)
            if vocabularies[0] != vocabularies[1]:
                raise Unsuitable(_other_vocabulary(self.student, *vocabularies))
            return module
        torch.manual_seed(context.seed)
        with torch.device(context.device):
            return AutoModelForCausalLM.from_config(self._config(teacher, context), dtype=torch.float32)

    def seeded(self, context: Context) -> Context:
        return dataclasses.replace(context, seed=context.seed + self.seed)

    def _config(self, teacher: nn.Module, context: Context) -> Any:
        configuration = getattr(teacher, "config", None)
        named = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
        if any(decoder_config.value_of(configuration, name) is None for name in named):
            raise Unsuitable("a student is derived from a transformers configuration, which this model has not")
        config: Any = copy.deepcopy(configuration)
        shape = _shape_of(config)
        student = self.reduced(shape)
        if not context.rehearsal and (student == shape or (self.layers or 1) > shape.layers):
            raise Unsuitable(f"the student would be no smaller than its teacher of {shape.layers} layers")
        for names, old, new in (
            (decoder_config.WIDTH, shape.width, student.width),
            (decoder_config.HEADS, shape.heads, student.heads),
            (decoder_config.KEY_VALUE_HEADS, shape.key_value_heads, student.key_value_heads),
        ):
            decoder_config.replace(config, names, old, new)
        if student.inner_width != shape.inner_width:
            decoder_config.describe_inner_width(config, shape.inner_width, student.inner_width)
        decoder_config.describe_layers(config, "", shape.layers, _kept(shape.layers, student.layers))
        return config

    @staticmethod
    def _named(name: str) -> Model:
        found: Model = registry.create("model", name, {})
        return found


class Distill(_Student):
    """A smaller student in the model's place, taught by it: softened KL and hard loss mixed (Hinton et al., 2015).

    loss = α · τ² · KL(teacher ‖ student), both softened by the temperature τ, + (1 - α) · cross entropy of the next
    tokens; means over tokens, in fp32. AdamW, 8 sequences of 128 tokens a step, the rate falling linearly to zero.
    The phase ``apply`` holds teacher, student, gradients and states; afterwards the teacher is gone. ``from-scratch``
    with the same options is what the student would have been without a teacher.

    Limits: the student is in fp32 whatever the teacher is in. A step takes the teacher's forward pass on top, so where
    there is text enough, more steps of ``from-scratch`` in the same time do better; where it is scarce, they do not. A
    student of fewer layers gains far more from ``start`` = 'teacher' than from being taught. suites/distillation.toml.
    """

    lost: ClassVar[str] = (
        "'distill' replaces the model: checkpointing, compile and adapters before it are lost, so put them after it"
    )
    temperature: float = Field(1.0, gt=0)
    alpha: float = Field(0.9, ge=0, le=1)
    """Share of the softened KL in the loss; the rest is the hard loss."""
    start: Literal["seed", "teacher"] = "seed"
    """'teacher': embeddings, norms and evenly chosen layers are copied, where only layers are left out."""

    def check(self, setting: Setting) -> str | None:
        if self.start == "teacher" and (self.student is not None or self.width < 1):
            return "start = 'teacher' copies whole layers: it goes with layers, not with width or student"
        return super().check(setting)

    def loses(self, technique: Technique) -> bool:
        return technique.trains_adapters or isinstance(technique, Checkpointing | Compile)

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch

        student = self.untrained(module, context)
        if self.start == "teacher":
            _copy_layers(module, student)
        was_training = module.training
        module.eval()

        def loss(learner: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                taught = _predictions(module, batch)
            learned = _predictions(learner, batch)
            hard = torch.nn.functional.cross_entropy(learned.flatten(0, 1), batch[:, 1:].flatten())
            return self.alpha * softened_kl(learned, taught, self.temperature) + (1 - self.alpha) * hard

        tune(student, self.seeded(context), self.steps, self.learning_rate, loss, self.text_tokens)
        return student.train(was_training)


class FromScratch(_Student):
    """The student of 'distill' trained alone, for as many steps on the same batches: what distilling is held against.

    loss = cross entropy of the next tokens. The model itself is not needed: its memory is given back before training.
    """

    lost: ClassVar[str] = "'from-scratch' replaces the model: what comes before it in the stack is lost"

    def loses(self, technique: Technique) -> bool:
        return type(technique).apply is not Technique.apply

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        student = self.untrained(module, context)
        was_training = module.training
        module.to("meta")
        tune(student, self.seeded(context), self.steps, self.learning_rate, next_token_loss, self.text_tokens)
        return student.train(was_training)


def softened_kl(learned: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """τ² · KL(taught ‖ learned) of logits (..., vocabulary), both softened by τ: the mean over all places.

    Gradients of softened logits shrink with 1/τ²; the factor keeps their share in a mixed loss.
    """
    import torch

    own = (learned / temperature).log_softmax(-1).flatten(0, -2)
    theirs = (taught / temperature).log_softmax(-1).flatten(0, -2)
    divergence = torch.nn.functional.kl_div(own, theirs, log_target=True, reduction="batchmean")
    return divergence * temperature**2


def _predictions(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 of the places that have a next token: (B, T - 1, vocabulary)."""
    return logits_of(module(batch), batch)[:, :-1].float()


def _shape_of(config: Any) -> Shape:
    heads = config.num_attention_heads
    width = config.hidden_size
    inner_width = decoder_config.number(config, decoder_config.INNER_WIDTH) or 4 * width
    return Shape(
        width=width,
        layers=config.num_hidden_layers,
        heads=heads,
        key_value_heads=decoder_config.number(config, decoder_config.KEY_VALUE_HEADS) or heads,
        inner_width=inner_width,
        vocabulary=config.vocab_size,
        longest=decoder_config.value_of(config, "max_position_embeddings") or 0,
        tied=bool(decoder_config.value_of(config, "tie_word_embeddings")),
    )


def _matrix_weights(shape: Shape) -> int:
    """Weights of a decoder's matrices, as Llama has them: enough to tell which of two of a family is smaller."""
    keys = shape.width // shape.heads * shape.key_value_heads
    layer = 2 * shape.width * (shape.width + keys) + 3 * shape.width * shape.inner_width
    return shape.layers * layer + (1 if shape.tied else 2) * shape.vocabulary * shape.width


def _size(shape: Shape) -> str:
    return f"{shape.layers} layers of width {shape.width} and inner width {shape.inner_width}"


def _kept(teacher_layers: int, student_layers: int) -> list[int]:
    """The layers of the teacher that a student of fewer begins with: evenly spread, the first always among them."""
    return [place * teacher_layers // student_layers for place in range(student_layers)]


def _copy_layers(teacher: nn.Module, student: nn.Module) -> None:
    """Copy into every tensor of the student what the teacher has in its place.

    Raises:
        Unsuitable: if an earlier technique has changed the teacher's tensors or their names, or if the teacher has
            layers with a forward or hooks of their own, which the student would not have.
    """
    theirs, own = the_layer_list(teacher, None), the_layer_list(student, None)
    where, kept = theirs.path, _kept(len(theirs.layers), len(own.layers))

    def taught(name: str) -> str:
        """The teacher's name for what the student names so."""
        place, _, rest = name.removeprefix(f"{where}.").partition(".")
        return f"{where}.{kept[int(place)]}.{rest}".rstrip(".") if name.startswith(f"{where}.") else name

    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        found = source.get(taught(name))
        if found is None or found.shape != tensor.shape or hasattr(found, "__tensor_flatten__"):
            raise Unsuitable(f"start = 'teacher' copies plain weights; an earlier technique has changed '{name}'")
        tensor.copy_(found)
    layers = dict(teacher.named_modules())
    for name, layer in student.named_modules():
        model = layers.get(taught(name))
        reason = None if model is None else reason_to_keep(model, None)
        if reason is not None and (type(model) is not type(layer) or "of its own" not in reason):
            raise Unsuitable(f"start = 'teacher' copies weights, and '{taught(name)}' is more than those: {reason}")


def _other_vocabulary(name: str, own: int, wanted: int) -> str:
    return f"student = '{name}' knows {own} token ids, the teacher {wanted}"
