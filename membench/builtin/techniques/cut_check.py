"""Whether a cut model computes what the whole one does without the parts that were taken out.

The parts are silenced in the whole model, and what its layers give for a few tokens is held against what the cut
model's give. Names and shapes say how a projection is probably laid out; this says whether it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from membench.builtin.techniques.decoder_layers import LayerList
from membench.builtin.techniques.importance import at_rest, first_tensor, run
from membench.errors import summary
from membench.host.out_of_memory import is_out_of_memory
from membench.plugins import Context, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOKENS = 4
_LARGEST_DIFFERENCE = {4: 1e-3, 2: 0.05}
"""By bytes a number, of the norm of what a layer gives. A wrong cut changes about as much as there is."""


class Probe:
    """Runs a model on a few tokens and keeps what some of its layers give.

    Args:
        body: the model without its output head, whose logits are not looked at.
        vocabulary: the number of token ids.
    """

    def __init__(self, body: nn.Module, vocabulary: int, context: Context) -> None:
        import torch

        self.body = body
        tokens = min(_TOKENS, context.model.max_tokens() or _TOKENS)
        random = torch.Generator().manual_seed(context.seed)
        self._ids = torch.randint(0, vocabulary, (1, tokens), generator=random).to(context.device)

    def run(self, layers: Sequence[nn.Module], hooks: Sequence[Any] = ()) -> list[torch.Tensor]:
        """What each layer gives, while hooks are in place; they are removed.

        Raises:
            Unsuitable: if the model does not run.
        """
        import torch

        found: dict[int, torch.Tensor] = {}

        def keep(position: int) -> Callable[..., None]:
            def hear(layer: nn.Module, given: Any, output: Any) -> None:
                found[position] = first_tensor(output).detach().float().cpu().clone()

            return hear

        handles = [*hooks, *(layer.register_forward_hook(keep(place)) for place, layer in enumerate(layers))]
        try:
            with ExitStack() as stack:
                stack.enter_context(at_rest(self.body))
                stack.enter_context(torch.no_grad())
                # oneDNN would keep a kernel for each shape of 16-bit product, which the case itself never needs.
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # switching it off warns of GPUs that are not there
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                run(self.body, self._ids)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise Unsuitable(f"a {type(self.body).__name__} does not run: {summary(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
        if len(found) < len(layers):
            raise Unsuitable(
                f"a {type(self.body).__name__} that is given token ids does not run all of these layers: cutting them"
                " cannot be checked"
            )
        return [found[position] for position in range(len(layers))]


def refuse_idle(module: nn.Module, lists: Sequence[LayerList], probe: Probe) -> None:
    """Refuse lists of layers through which token ids do not pass, such as a vision tower's, and name the others.

    Raises:
        Unsuitable: if there are such.
    """
    if len(lists) == 1:
        return
    run: set[int] = set()

    def note(layer: nn.Module, given: Any, output: Any) -> None:
        run.add(id(layer))

    probe.run([], [layer.register_forward_hook(note) for each in lists for layer in each.layers])
    idle = [each for each in lists if not any(id(layer) in run for layer in each.layers)]
    others = [each for each in lists if each not in idle]
    if idle and others:
        raise Unsuitable(
            f"a {type(module).__name__} that is given token ids does not run {', '.join(map(str, idle))}: cutting these"
            f" cannot be checked; name others with layers = …: {', '.join(map(str, others))}"
        )


@contextmanager
def unchanged(probe: Probe, layers: Sequence[nn.Module], silence: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """Check that what happens in this context changes nothing for layers but what silencing parts of the model does.

    Args:
        silence: hooks into the model that silence the parts.

    Raises:
        Unsuitable: if it does. The model is then of no use.
    """
    import torch

    bytes_a_number = min((p.element_size() for p in probe.body.parameters() if p.is_floating_point()), default=4)
    expected = probe.run(layers, silence())
    yield
    try:
        found = probe.run(layers)
    except Unsuitable as error:
        raise Unsuitable(f"cut, {error}") from error
    most = _LARGEST_DIFFERENCE.get(bytes_a_number, _LARGEST_DIFFERENCE[4])
    for before, after in zip(expected, found, strict=True):
        if torch.equal(before, after):
            continue  # all that tensors without values, with which cases are estimated, can be asked
        largest = before.norm().clamp(min=1e-30)
        difference = float((after - before).norm() / largest) if after.shape == before.shape else 1.0
        if not difference <= most:  # nor if it is no number
            raise Unsuitable(
                f"a {type(probe.body).__name__} would compute something else with these parts taken out than with"
                f" these parts silent (what a layer gives is {difference:.1%} off)"
            )


def without_inputs(layer: nn.Module, indices: torch.Tensor) -> Any:
    """A hook by which some of a layer's inputs are zero."""

    def silence(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0].index_fill(-1, indices.to(given[0].device), 0), *given[1:])

    return layer.register_forward_pre_hook(silence)


def without_outputs(layer: nn.Module, indices: torch.Tensor) -> Any:
    """A hook by which some of a layer's outputs are zero."""

    def silence(layer: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, indices.to(output.device), 0)

    return layer.register_forward_hook(silence)


def passed_by(layer: nn.Module) -> Any:
    """A hook by which a layer gives what it is given."""
    import torch

    def pass_by(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        unchanged = first_tensor((*given, *named.values()))
        return unchanged if isinstance(output, torch.Tensor) else (unchanged, *output[1:])

    return layer.register_forward_hook(pass_by, with_kwargs=True)
