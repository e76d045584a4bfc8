"""Channels, heads and layers taken out of plain modules of torch, whose parts are found by structure or by names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import membench
from membench.errors import SuiteError
from membench.plugins import Context, NotInModel, Technique, Unsuitable, registry
from membench.testing.tiny import Tiny

if TYPE_CHECKING:
    import torch
    from torch import nn

_NETWORK = {"up": ["gate", "wide"], "down": "back"}
_ATTENTION = {"qkv": ["ask", "tell", "say"], "output": "gather", "heads": 4}


@pytest.fixture(scope="module", autouse=True)
def _little_text() -> Iterator[None]:
    from membench.builtin.techniques import importance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "_PIECES", 2)
        yield


class _Named(Tiny):
    def vocabulary(self, module: nn.Module) -> int:
        return 96


def _context(rehearsal: bool = False) -> Context:
    return Context("cpu", 0, _Named(), lambda name: contextlib.nullcontext(), {}, Path(), rehearsal=rehearsal)


def _technique(name: str, options: dict[str, Any]) -> Technique:
    return cast(Technique, registry.create("technique", name, options))


def _built(name: str) -> Any:
    import torch

    from membench.testing.tiny import tiny_module
    from tests import plain_modules

    torch.manual_seed(0)
    module = tiny_module() if name == "tiny" else getattr(plain_modules, name)()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def _logits(module: Any) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return cast("torch.Tensor", module(torch.arange(40).view(2, 20)))


def _with_zeros(whole: nn.Module, cut: nn.Module) -> dict[str, int]:
    """Set to zero in the whole model what layers of the cut one do not take in any more: how many, by layer."""
    from torch import nn

    left, gone = dict(cut.named_modules()), {}
    for name, layer in whole.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features != left[name].in_features:
            after = cast(Any, left[name]).weight
            stays = (layer.weight[:, :, None] == after[:, None, :]).all(0).any(1)
            assert int(stays.sum()) == after.shape[1]
            layer.weight.data[:, ~stays] = 0
            gone[name] = int((~stays).sum())
    return gone


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    import torch

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "technique", "options", "gone"),
    [
        ("encoder", "prune-ffn", {}, {f"encoder.layers.{place}.linear2": 28 for place in range(4)}),
        ("encoder", "prune-ffn", {"layers": "encoder.layers.[02]"},
         {f"encoder.layers.{place}.linear2": 28 for place in (0, 2)}),
        ("tiny", "prune-ffn", {}, {f"blocks.{place}.mlp.2": 64 for place in range(2)}),
        # Its one projection of queries, keys and values has another order than others of the same name.
        ("tiny", "prune-heads", {}, {f"blocks.{place}.attention.output": 32 for place in range(2)}),
        ("blocks", "prune-ffn", _NETWORK, {f"{place}.back": 12 for place in range(1, 5)}),
        ("blocks", "prune-heads", _ATTENTION, {f"{place}.gather": 16 for place in range(1, 5)}),
        ("towers", "prune-ffn", _NETWORK,
         {f"{tower}.{place}.back": 12 for tower in ("first", "second") for place in range(2)}),
        ("towers", "prune-heads", {"layers": "second.*", **_ATTENTION},
         {f"second.{place}.gather": 16 for place in range(2)}),
        ("two_modalities", "prune-ffn", {"layers": "first.*", **_NETWORK},
         {f"first.{place}.back": 12 for place in range(2)}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_a_plain_module_computes_what_the_whole_does_with_the_same_parts_zero(
    model: str, technique: str, options: dict[str, Any], gone: dict[str, int], importance: str
) -> None:
    module = _built(model)
    whole = copy.deepcopy(module)
    _technique(technique, {**options, "importance": importance}).apply(module, _context())
    assert _with_zeros(whole, module) == gone
    _same(_logits(module), _logits(whole))


@pytest.mark.parametrize(
    ("model", "options", "names"),
    [
        ("encoder", {}, ["encoder.layers.0", "encoder.layers.1"]),
        ("tiny", {}, ["blocks.0"]),
        ("blocks", {}, ["1", "2"]),
        ("towers", {"layers": "second.*"}, ["first.0", "first.1", "second.0"]),
    ],
)
def test_a_plain_module_loses_the_layers_that_change_least(
    model: str, options: dict[str, Any], names: list[str]
) -> None:
    module = _built(model)
    whole = copy.deepcopy(module)
    _technique("drop-layers", options).apply(module, _context())
    assert list(_layers(module)) == names
    for layer in _layers(whole).values():
        if not any(_equal(layer, left) for left in _layers(module).values()):
            layer.register_forward_hook(lambda layer, given, output: given[0])
    _same(_logits(module), _logits(whole))


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    kinds = ("Block", "TransformerEncoderLayer")
    return {name: child for name, child in module.named_modules() if type(child).__name__ in kinds}


def _equal(one: nn.Module, other: nn.Module) -> bool:
    return all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "technique", "options", "error", "reason"),
    [
        ("blocks", "prune-ffn", {}, Unsuitable,
         r"'1' \(a Block\) has no feed-forward network of known names: name one with up = \[...\] and down = …; "
         "its linear layers are gate, wide, back, ask, tell, say and more"),
        ("blocks", "prune-heads", {}, Unsuitable, r"'1' \(a Block\) has no attention of known names: name one with"),
        ("blocks", "prune-heads", {**_ATTENTION, "heads": None}, Unsuitable, "say it with heads = "),
        ("blocks", "prune-heads", {**_ATTENTION, "heads": 5}, Unsuitable, r"\[32, 32, 32\] outputs lead into"),
        ("blocks", "prune-heads", {**_ATTENTION, "heads": 8}, Unsuitable, "would compute something else"),
        ("blocks", "prune-ffn", {"up": ["gate"], "down": "back"}, Unsuitable, "cut, a Sequential does not run: "),
        ("blocks", "prune-ffn", {"up": ["gate", "wider"], "down": "back"}, NotInModel, "'1' has no 'wider'; its"),
        ("blocks", "prune-ffn", {"layers": "layer.*", **_NETWORK}, NotInModel,
         r"layers = 'layer\.\*' matches no module of the Sequential; its lists of layers are '\*' \(4 Block\)"),
        ("blocks_with_a_softmax", "prune-ffn", _NETWORK, Unsuitable, "would compute something else"),
        ("blocks_of_shared_weights", "prune-ffn", _NETWORK, Unsuitable,
         "'1.gate.weight' and '2.gate.weight' are one weight"),
        ("encoder", "prune-heads", {}, Unsuitable,
         r"'encoder\.layers\.0\.self_attn' is a MultiheadAttention, whose heads always share the whole width"),
        ("towers", "drop-layers", {}, Unsuitable,
         r"the layers are in 2 lists; name one with layers = …: 'first\.\*' \(2 Block\), 'second\.\*' \(2 Block\)"),
        ("two_modalities", "prune-ffn", _NETWORK, Unsuitable,
         r"a TwoModalities that is given token ids does not run 'second\.\*' \(2 Block\): cutting these cannot be "
         r"checked; name others with layers = …: 'first\.\*' \(2 Block\)"),
        ("two_modalities", "prune-heads", {"layers": "second.*", **_ATTENTION}, Unsuitable,
         "does not run all of these layers: cutting them cannot be checked"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_the_reason_and_what_there_is(
    model: str, technique: str, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        _technique(technique, options).apply(_built(model), _context())


@pytest.mark.parametrize(
    ("technique", "options"),
    [("prune-ffn", _NETWORK), ("prune-heads", _ATTENTION), ("drop-layers", {}), ("prune-ffn", {}), ("prune-heads", {})],
)
def test_a_model_without_a_miniature_is_rehearsed_on_parts_of_standard_names(
    technique: str, options: dict[str, Any]
) -> None:
    from membench.worker.rehearsal_model import RehearsalModel
    from membench.worker.weights import weight_bytes

    model = RehearsalModel()
    context = Context("cpu", 0, model, lambda name: contextlib.nullcontext(), {}, Path(), rehearsal=True)
    whole = model.build(context)
    cut = _technique(technique, {"layers": "blocks.*", **options}).apply(copy.deepcopy(whole), context)
    assert weight_bytes(cut) < weight_bytes(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('use = "prune-ffn"\nup = ["fc1"]', "up and down name the two ends of a feed-forward network"),
        ('use = "prune-heads"\noutput = "o"', "qkv and output name the two ends of an attention"),
        ('use = "prune-heads"\noutput = "o"\nqkv = ["a", "b"]', "or one that is all three: not 2"),
        ('use = "drop-layers"\nlayers = ""', "layers"),
    ],
)
def test_options_that_do_not_go_together_are_one_line_of_the_suites_error(
    suite_file: Path, options: str, message: str
) -> None:
    suite_file.write_text(
        '[suite]\nname = "bad"\n[matrix]\nmodel = ["trained-tiny"]\ntechnique = ["p"]\nworkload = ["forward"]\n'
        f"[technique.p]\n{options}\n"
    )
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(suite_file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
