"""Models that adapters are put on, and what tests of adapters do with them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from membench.builtin.models.transformer import Gpt2, Llama, Qwen
from membench.plugins import Context, Model, Shape, Technique, registry

if TYPE_CHECKING:
    from torch import nn

SHAPE = Shape(width=64, layers=2, heads=4, key_value_heads=2, inner_width=192, vocabulary=96, longest=160, tied=True)
EVEN = SHAPE._replace(key_value_heads=4)
MODELS: dict[str, Model] = {
    "llama": Llama.of_shape(SHAPE),
    "qwen": Qwen.of_shape(SHAPE),
    "gpt2": Gpt2.of_shape(EVEN),
    "llama, no groups": Llama.of_shape(EVEN),
}


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    """On one thread; what libraries warn of while they are imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import torchao.quantization  # noqa: F401
        import transformers.models.auto.modeling_auto
        import transformers.models.gpt2.modeling_gpt2
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def context_of(model: str) -> Context:
    return Context("cpu", 0, MODELS[model], lambda name: contextlib.nullcontext(), {}, Path())


def technique_named(name: str, **options: Any) -> Technique:
    return cast(Technique, registry.create("technique", name, options))


def built_with(model: str, *techniques: Technique) -> Any:
    """A model that does not drop out, with techniques applied in order."""
    module = MODELS[model].build(context_of(model))
    for technique in techniques:
        module = technique.apply(module, context_of(model))
    return module.eval()


def trained_in(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
