"""Which layers adapters are put on: those named in ``targets`` or by standard names; and what is said of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from membench.plugins import NotInModel, Unsuitable
from tests.adapting import built_with, context_of, technique_named, trained_in
from tests.adapting import undisturbed as undisturbed  # a fixture of every test here

if TYPE_CHECKING:
    from torch import nn


def test_targets_that_no_layer_has_are_named_with_what_there_is() -> None:
    with pytest.raises(NotInModel) as caught:
        built_with("gpt2", technique_named("lora", targets=["q_proj", "v_proj"]))
    assert str(caught.value) == (
        "no layer has a name of targets = [q_proj, v_proj]; there are wte, wpe, ln_1, c_attn, c_proj, ln_2, c_fc, ln_f,"
        " lm_head"
    )


def test_standard_names_at_the_top_of_a_model_are_no_targets_by_default_and_are_named() -> None:
    from torch import nn

    def two() -> nn.Module:
        return nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})

    with pytest.raises(Unsuitable) as caught:
        technique_named("lora").apply(two(), context_of("llama"))
    assert str(caught.value) == (
        "no layer is adapted: fc1, fc2 (at the top of the model; name it in targets to adapt it)"
    )
    assert len(trained_in(technique_named("lora", targets=["fc1", "fc2"]).apply(two(), context_of("llama")))) == 4


@pytest.mark.parametrize("technique", ["lora", "qlora"])
def test_convolutions_of_projections_names_are_left_alone_and_named(technique: str) -> None:
    from torch import nn

    def block(value: nn.Module) -> nn.Module:
        return nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Conv1d(64, 64, 1, groups=4), "value": value})})

    context = context_of("llama")
    adapters = technique_named(technique, targets=["query", "value"])
    module = adapters.apply(block(nn.Linear(64, 64)), context)
    assert [(left.path, left.reason) for left in context.left_alone] == [
        ("attention.query", "it is a Conv1d, no linear layer")
    ]
    assert len(trained_in(module)) == 2
    assert adapters.remark(module, context) is None
    cast(Any, adapters).optimizer(None, module, context)  # looks for gradients through what is adapted
    with pytest.raises(Unsuitable) as caught:
        adapters.apply(block(nn.Conv1d(64, 64, 1)), context_of("llama"))
    assert str(caught.value) == (
        "no layer is adapted: attention.query (it is a Conv1d, no linear layer),"
        " attention.value (it is a Conv1d, no linear layer)"
    )


def test_a_target_that_no_layer_has_is_remarked() -> None:
    technique = technique_named("lora", targets=["q_proj", "qproj"])
    module = built_with("llama", technique)
    assert technique.remark(module, context_of("llama")) == "no layer is named qproj: there are no adapters for it"
    for technique in (technique_named("lora"), technique_named("lora", targets=["q_proj"])):
        module = built_with("llama", technique)
        assert technique.remark(module, context_of("llama")) is None


def test_projections_of_other_names_have_adapters_and_output_heads_have_none() -> None:
    from torch import nn

    from membench.testing.tiny import tiny_module

    model = nn.ModuleDict({"body": tiny_module(), "mlp": nn.ModuleDict({"linear1": nn.Linear(8, 8)})})
    model["output"] = nn.Linear(64, 256)  # a name of attention's projections, but at the top
    adapted = technique_named("lora").apply(model, context_of("llama"))
    found = {name.partition(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    parts = {f"body.blocks.{n}.attention.{name}" for n in (0, 1) for name in ("query_key_value", "output")}
    assert found == {*parts, "mlp.linear1"}
