"""What takes the place of modules that other stages of a pipeline have, and how a stage runs between them.

B sequences of T tokens, H the width of the hidden states between layers, V the vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from membench.plugins import logits_of


class StageLeft(Exception):
    """Raised where a stage ends, in the middle of its model's forward pass, with what it sends on.

    Attributes:
        hidden: the hidden states (B, T, H).
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("the forward pass reached a layer of the next stage")
        self.hidden = hidden


class AbsentInput(nn.Module):
    """In place of a module before the layers: zeros of its width, which take no memory and which nothing reads."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, *given: Any, **named: Any) -> torch.Tensor:
        first = next(each for each in (*given, *named.values()) if isinstance(each, torch.Tensor))
        shape = first.shape if not first.is_floating_point() else first.shape[:-1]
        return torch.zeros((), dtype=self._dtype, device=first.device).expand(*shape, self._width)


class AbsentLayer(nn.Module):
    """In place of a layer, or of a module behind the layers, that another stage has.

    It keeps what a model reads of its layers to choose their inputs, such as the kind of attention.

    Args:
        in_tuple: whether the layer returns its hidden states in a tuple.
    """

    def __init__(self, layer: nn.Module, *, in_tuple: bool) -> None:
        super().__init__()
        self.training = layer.training
        self._in_tuple = in_tuple
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, str | bool | int | float)}
        vars(self).update({name: value for name, value in plain.items() if name not in vars(self)})

    def forward(self, *given: Any, **named: Any) -> Any:
        hidden = _hidden(given, named)
        return (hidden,) if self._in_tuple else hidden


class Entrance(AbsentLayer):
    """The last layer before a stage's own: it returns what the stage before has sent."""

    received: torch.Tensor | None = None

    def forward(self, *given: Any, **named: Any) -> Any:
        return (self.received,) if self._in_tuple else self.received


class Exit(AbsentLayer):
    """The first layer behind a stage's own: it ends the forward pass."""

    def forward(self, *given: Any, **named: Any) -> Any:
        raise StageLeft(_hidden(given, named))


def _hidden(given: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = given[0] if given else named["hidden_states"]
    return found


class StageForward:
    """Runs a stage: token ids (B, T) or received hidden states (B, T, H) to hidden states, or to logits (B, T, V).

    It is called in place of the module's own forward, which it runs from the stage's entrance to its exit: masks,
    positions and rotary embeddings are computed on each stage, as the model does it.

    Args:
        entrance: ``None`` on the first stage.
        dtype: of the hidden states that are sent: the receiver's buffers are made for it.
    """

    def __init__(self, module: nn.Module, entrance: Entrance | None, dtype: torch.dtype) -> None:
        # Weakly, as the module holds this: it is freed at once, and not by the next garbage collection.
        self._module = weakref.ref(module)
        self._own: Callable[..., Any] | None = vars(module).get("forward")
        self._entrance, self._dtype = entrance, dtype

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        module = self._module()
        assert module is not None
        own = self._own or type(module).forward.__get__(module)
        ids = given if self._entrance is None else torch.zeros(given.shape[:2], dtype=torch.long, device=given.device)
        if self._entrance is not None:
            self._entrance.received = given
        try:
            return logits_of(own(ids), ids)
        except StageLeft as left:
            return left.hidden.to(self._dtype).contiguous()
        finally:
            if self._entrance is not None:
                self._entrance.received = None


class Chunk(nn.Module):
    """One of several stages that a rank has of the same module.

    Args:
        owned: the modules whose parameters are the stage's.
        run: runs the stage.
    """

    def __init__(self, owned: Sequence[nn.Module], run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.owned = nn.ModuleList(owned)
        self._run = run

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self._run(given)
