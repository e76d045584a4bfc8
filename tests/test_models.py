"""Published sizes, on the meta device."""

from __future__ import annotations

import pytest

from membench import registry

_PUBLISHED = {
    "gpt2-82m": 81_912_576,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-15m": 15_191_712,
    "llama-60m": 58_073_600,
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "qwen-0.5b": 494_032_768,
    "qwen-1.5b": 1_543_714_304,
    "qwen-7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", _PUBLISHED)
@pytest.mark.filterwarnings("ignore")  # what transformers warns of while importing is not ours
def test_a_model_has_as_many_parameters_as_was_published(name: str) -> None:
    model = registry.create("model", name, {})
    assert sum(parameter.numel() for parameter in model.skeleton().parameters()) == _PUBLISHED[name]
