"""Context parallelism: every rank has the whole model, and its own tokens of each sequence.

B, T, V: batch, tokens, vocabulary; N: ranks along the dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from membench.builtin.techniques import decoder_config
from membench.builtin.techniques.attention import EagerAttention
from membench.builtin.techniques.parallel.sequence_parts import Ring, SequenceParts, Ulysses
from membench.builtin.techniques.parallel.tensor_plan import not_divisible
from membench.builtin.workloads.train import predicts_masked_tokens, token_loss
from membench.plugins import Context, Dimension, Parallel, Setting, TrainingStep, Unsuitable, logits_of
from membench.plugins.parallel import degrees

if TYPE_CHECKING:
    import torch
    from torch import nn

_NAME = "membench-context-parallel"
_NOTHING = -100


class ContextParallel(Parallel):
    """Each rank has all weights and T/N tokens of every sequence; attention alone sees the whole of it.

    Activations and logits take 1/N; weights, gradients and states are whole. On a CPU by Ulysses: around attention,
    ranks exchange tokens of all heads for all tokens of a/N heads. On a GPU by torch's ring attention. Gradients are
    averaged over the ranks before the optimizer's step, in place and each by itself.

    Source: Jacobs et al., 2023, DeepSpeed Ulysses, arXiv:2309.14509; torch's context_parallel, a prototype. Limits:
    decoders of transformers whose attention goes through its registry of attention functions, causal over the whole
    sequence; on a CPU, heads and key-value heads must be divisible by N. There is one loss, that of the workload.
    """

    acts_on: ClassVar[str] = "activations"
    dimension: ClassVar[Dimension] = "sequence"
    needs_all_gradients: ClassVar[bool] = True

    _parts: SequenceParts | None = PrivateAttr(None)
    _module: weakref.ref[nn.Module] | None = PrivateAttr(None)
    _keeps_part: bool = PrivateAttr(False)

    def refuse(self, setting: Setting) -> str | None:
        if reason := super().refuse(setting):
            return reason
        assert setting.ranks is not None
        others = (*setting.before, *setting.after)
        found = degrees((*setting.before, self, *setting.after), setting.ranks)
        count = found[self.dimension]
        if setting.workload.decoded_tokens_per_step() is not None:
            return "it shares the tokens of a sequence among ranks, and generating takes one at a time"
        if not (tokens := setting.workload.longest_sequence()):
            return "it shares the tokens of a sequence among ranks, and this workload has none"
        if any(isinstance(other, EagerAttention) for other in others):
            return "it computes attention by torch's fused kernel, and the stack names 'eager-attention'"
        kind = Ulysses if setting.device == "cpu" else Ring
        if tokens % (count * kind.multiple):
            return f"{tokens} tokens cannot be shared among {count} ranks in parts of one length"
        shape = setting.model.shape
        sharing = count * found.get("tensor", 1)
        return not_divisible(shape.heads, shape.key_value_heads, sharing) if shape and kind is Ulysses else None

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        from transformers import AttentionInterface

        assert context.ranks is not None
        mesh = context.ranks.mesh[self.dimension]
        self._parts = Ulysses(mesh) if mesh.device_type == "cpu" else Ring(mesh)
        sharing = mesh.size() * context.ranks.degree("tensor") if mesh.device_type == "cpu" else 1
        window = _refuse_other_attention(module, sharing)
        AttentionInterface.register(_NAME, self._parts.attend)
        module.set_attn_implementation(_NAME)  # type: ignore[operator]
        if module.config._attn_implementation != _NAME:  # type: ignore[union-attr]
            raise Unsuitable(f"{type(module).__name__} cannot exchange its attention")
        _Hooks(self, self._parts, window).register(module)
        # Weakly: the technique outlives the rehearsal, of whose module nothing must stay.
        self._module = weakref.ref(module)
        return module

    @property
    def keeps_part(self) -> bool:
        """Whether the module returns the logits of this rank's tokens, and does not gather those of all."""
        return self._keeps_part

    @contextlib.contextmanager
    def keeping_part(self) -> Iterator[None]:
        before, self._keeps_part = self._keeps_part, True
        try:
            yield
        finally:
            self._keeps_part = before

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        import torch
        from torch import distributed

        parts, spread = self._parts, None if self._module is None else self._module()
        assert parts is not None
        assert spread is not None
        if step.loss is not token_loss:
            raise Unsuitable("it computes the loss of each rank's tokens by itself, and the stack names another loss")
        group = parts.mesh.get_group()

        def loss(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
            with self.keeping_part():
                output: Any = module(rows)
            assert parts.positions is not None
            own = parts.positions
            # The last token predicts nothing; the last of any other part predicts the first of the next one.
            following = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=_NOTHING)[:, own]
            logits = logits_of(output, following).float()
            total = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), following.flatten(), ignore_index=_NOTHING, reduction="sum"
            )
            # The mean over ranks is the mean over all tokens.
            return total * (parts.mesh.size() / rows[:, 1:].numel())

        def backward(value: torch.Tensor) -> None:
            step.backward(value)
            parts.close()

        def averaged() -> None:
            for parameter in spread.parameters():
                if parameter.grad is not None:
                    gradient: Any = parameter.grad
                    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                    distributed.all_reduce(own, distributed.ReduceOp.AVG, group=group)
            step.step()

        return dataclasses.replace(step, loss=loss, backward=backward, step=averaged)


class _Hooks:
    """Gives a module this rank's tokens of those it is called with, and gathers the logits of all."""

    def __init__(self, technique: ContextParallel, parts: SequenceParts, window: int | None) -> None:
        self._technique, self._parts, self._window = technique, parts, window
        self._tokens = self._calls_before = 0

    def register(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        import torch

        ids: torch.Tensor = given[0] if given else named["input_ids"]
        self._tokens, self._calls_before = ids.shape[1], self._parts.calls
        if self._window is not None and self._tokens > self._window:
            raise Unsuitable(f"its attention sees {self._window} tokens, and a sequence has {self._tokens}")
        # What comes after a token changes nothing for it. Held-out text may end anywhere.
        ids = torch.nn.functional.pad(ids, (0, -self._tokens % (self._parts.multiple * self._parts.mesh.size())))
        own = self._parts.open(ids)
        assert self._parts.positions is not None
        rest = {name: value for name, value in named.items() if name != "input_ids"}
        return (own, *given[1:]), {**rest, "position_ids": self._parts.positions[None]}

    def _after(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        import torch

        if self._parts.calls == self._calls_before:
            raise Unsuitable(f"the attention of {type(module).__name__} does not go through transformers' registry")
        if not torch.is_grad_enabled():
            if not self._technique.keeps_part:
                output["logits"] = self._parts.gathered(output["logits"])[:, : self._tokens]
            self._parts.close()
        return output


def _refuse_other_attention(module: nn.Module, count: int) -> int | None:
    """Return how many tokens attention sees; ``None``: all.

    Args:
        count: ranks that share heads.

    Raises:
        Unsuitable: if a model's tokens meet anywhere but in causal attention over the whole sequence.
    """
    kind, config = type(module).__name__, decoder_config.text_config(module)
    if config is None or not getattr(module, "_supports_attention_backend", False):
        raise Unsuitable(f"the attention of {kind} does not go through transformers' registry of attention functions")
    if module.config.is_encoder_decoder or predicts_masked_tokens(type(module)):  # type: ignore[union-attr]
        raise Unsuitable(f"{kind} is no decoder alone: its tokens also see those after them")
    if "position_ids" not in inspect.signature(module.forward).parameters:
        raise Unsuitable(f"{kind} takes no position_ids: a rank's tokens would begin at position 0")
    others = set(decoder_config.value_of(config, "layer_types") or ()) - {"full_attention"}
    if others:
        raise Unsuitable(f"{kind} has layers of other kinds than full attention: {', '.join(sorted(others))}")
    if decoder_config.number(config, ("attn_logit_softcapping", "attn_logit_softcap")) is not None:
        raise Unsuitable(f"{kind} caps the scores of its attention, which torch's fused kernel does not")
    heads = decoder_config.number(config, decoder_config.HEADS) or count
    key_value_heads = decoder_config.number(config, decoder_config.KEY_VALUE_HEADS) or heads
    if reason := not_divisible(heads, key_value_heads, count):
        raise Unsuitable(reason)
    return decoder_config.number(config, ("sliding_window",))
