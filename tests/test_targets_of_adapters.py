"""Which layers adapters are put on: those named in ``targets`` or by standard names; and what is said of others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from membench.builtin.models.transformer import Gpt2, Llama
from membench.plugins import Context, Model, NotInModel, Shape, Technique, Unsuitable, registry

if TYPE_CHECKING:
    from torch import nn

_SHAPE = Shape(width=64, layers=2, heads=4, key_value_heads=4, inner_width=192, vocabulary=96, longest=160, tied=True)
_MODELS: dict[str, Model] = {"llama": Llama.of_shape(_SHAPE), "gpt2": Gpt2.of_shape(_SHAPE)}


@pytest.fixture(scope="module", autouse=True)
def _undisturbed() -> Iterator[None]:
    """On one thread; what libraries warn of while they are imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import torchao.quantization  # noqa: F401
        import transformers.models.auto.modeling_auto
        import transformers.models.gpt2.modeling_gpt2
        import transformers.models.llama.modeling_llama  # noqa: F401
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _context(model: str) -> Context:
    return Context("cpu", 0, _MODELS[model], lambda name: contextlib.nullcontext(), {}, Path())


def _technique(name: str, **options: Any) -> Technique:
    return cast(Technique, registry.create("technique", name, options))


def _built(model: str, *techniques: Technique) -> Any:
    """A model that does not drop out, with techniques applied in order."""
    module = _MODELS[model].build(_context(model))
    for technique in techniques:
        module = technique.apply(module, _context(model))
    return module.eval()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_targets_that_no_layer_has_are_named_with_what_there_is() -> None:
    with pytest.raises(NotInModel) as caught:
        _built("gpt2", _technique("lora", targets=["q_proj", "v_proj"]))
    assert str(caught.value) == (
        "no layer has a name of targets = [q_proj, v_proj]; there are wte, wpe, ln_1, c_attn, c_proj, ln_2, c_fc, ln_f,"
        " lm_head"
    )


def test_standard_names_at_the_top_of_a_model_are_no_targets_by_default_and_are_named() -> None:
    from torch import nn

    def two() -> nn.Module:
        return nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})

    with pytest.raises(Unsuitable) as caught:
        _technique("lora").apply(two(), _context("llama"))
    assert str(caught.value) == (
        "no layer is adapted: fc1, fc2 (at the top of the model; name it in targets to adapt it)"
    )
    assert len(_trained(_technique("lora", targets=["fc1", "fc2"]).apply(two(), _context("llama")))) == 4


@pytest.mark.parametrize("technique", ["lora", "qlora"])
def test_convolutions_of_projections_names_are_left_alone_and_named(technique: str) -> None:
    from torch import nn

    def block(value: nn.Module) -> nn.Module:
        return nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Conv1d(64, 64, 1, groups=4), "value": value})})

    context = _context("llama")
    adapters = _technique(technique, targets=["query", "value"])
    module = adapters.apply(block(nn.Linear(64, 64)), context)
    assert [(left.path, left.reason) for left in context.left_alone] == [
        ("attention.query", "it is a Conv1d, no linear layer")
    ]
    assert len(_trained(module)) == 2
    assert adapters.remark(module, context) is None
    cast(Any, adapters).optimizer(None, module, context)  # looks for gradients through what is adapted
    with pytest.raises(Unsuitable) as caught:
        adapters.apply(block(nn.Conv1d(64, 64, 1)), _context("llama"))
    assert str(caught.value) == (
        "no layer is adapted: attention.query (it is a Conv1d, no linear layer),"
        " attention.value (it is a Conv1d, no linear layer)"
    )


def test_a_target_that_no_layer_has_is_remarked() -> None:
    technique = _technique("lora", targets=["q_proj", "qproj"])
    module = _built("llama", technique)
    assert technique.remark(module, _context("llama")) == "no layer is named qproj: there are no adapters for it"
    for technique in (_technique("lora"), _technique("lora", targets=["q_proj"])):
        module = _built("llama", technique)
        assert technique.remark(module, _context("llama")) is None


def test_projections_of_other_names_have_adapters_and_output_heads_have_none() -> None:
    from torch import nn

    from membench.testing.tiny import tiny_module

    model = nn.ModuleDict({"body": tiny_module(), "mlp": nn.ModuleDict({"linear1": nn.Linear(8, 8)})})
    model["output"] = nn.Linear(64, 256)  # a name of attention's projections, but at the top
    adapted = _technique("lora").apply(model, _context("llama"))
    found = {name.partition(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    parts = {f"body.blocks.{n}.attention.{name}" for n in (0, 1) for name in ("query_key_value", "output")}
    assert found == {*parts, "mlp.linear1"}
