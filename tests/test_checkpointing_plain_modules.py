"""Checkpointing of layers in plain torch: the same training, and of each layer its input alone is kept."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from membench.plugins import Context, Model, NotInModel, Unsuitable, registry
from tests.training import context, train

if TYPE_CHECKING:
    import torch
    from torch import nn

_B, _T, _WIDTH = 4, 16, 32


class _Plain(Model):
    name: str

    def build(self, context: Context) -> nn.Module:
        import torch

        from membench.testing.tiny import tiny_module
        from tests import plain_modules

        torch.manual_seed(0)
        module: nn.Module = tiny_module() if self.name == "tiny" else getattr(plain_modules, self.name)()
        return module

    def vocabulary(self, module: nn.Module) -> int:
        return 96


def _technique(**options: Any) -> Any:
    return registry.create("technique", "checkpointing", options)


@pytest.mark.parametrize("name", ["tiny", "encoder", "blocks", "towers"])
def test_computing_again_changes_no_bit_of_a_training(name: str) -> None:
    plain, saving = train(_Plain(name=name)), train(_Plain(name=name), [_technique()])
    assert saving.losses == plain.losses
    assert saving.largest_difference(plain) == 0.0
    assert plain.module.state_dict().keys() == saving.module.state_dict().keys()


def _kept_bytes(module: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights and token ids apart."""
    import torch

    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(_B * _T).view(_B, _T)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(ids)
    del output
    return sum(kept.values())


@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, 4), ({"layers": "[1-4]"}, 4), ({"layers": "[12]"}, 2), ({"every_k": 2}, 2)],
)
def test_of_each_checkpointed_layer_its_input_alone_is_kept(options: dict[str, Any], layers: int) -> None:
    model = _Plain(name="blocks")
    plain = model.build(context(model)).train()
    saving = _technique(**options).apply(copy.deepcopy(plain), context(model))
    state = _B * _T * _WIDTH * 4
    # The embedding keeps ids, the head what the last layer gives; each of the layers its input and the rest.
    whole = (_kept_bytes(plain) - state) // 4
    assert _kept_bytes(saving) == layers * state + (4 - layers) * whole + state
    assert whole > 8 * state


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_a_copy_is_checkpointed_too_and_computes_with_its_own_weights(copied: Any) -> None:
    import torch

    model = _Plain(name="blocks")
    module = _technique().apply(model.build(context(model)), context(model))
    other = copied(module)
    assert _kept_bytes(other.train()) == _kept_bytes(module.train()) == 5 * _B * _T * _WIDTH * 4
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(torch.zeros(1, 2, dtype=torch.long)).abs().max() == 0


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"layers": "block.*"}, NotInModel, r"layers = 'block\.\*' matches no module of the Towers; its lists of "
         r"layers are 'first\.\*' \(2 Block\), 'second\.\*' \(2 Block\)"),
        ({"every_k": 5}, Unsuitable, "every_k = 5 is more than the model's 4 layers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_told_with_what_there_is(
    options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    model = _Plain(name="towers")
    with pytest.raises(error, match=reason):
        _technique(**options).apply(model.build(context(model)), context(model))


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    model = _Plain(name="blocks")
    module: Any = model.build(context(model))
    module[1].forward = module[1].forward
    with pytest.raises(Unsuitable, match="a Block has a forward of its own"):
        _technique().apply(module, context(model))
