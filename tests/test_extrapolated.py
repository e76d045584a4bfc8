"""What deep models need, from few of their layers: to the byte what tracing all layers finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import membench
from membench.host.device import Device
from membench.plugins.checking import complaint
from membench.protocol.readings import RankEstimate
from membench.protocol.requests import MeasureCase, ReferenceLogits, Steps
from membench.suite.suite import Suite
from membench.worker.tracing.extrapolation import Unlike, extended, extrapolated
from membench.worker.tracing.ledger import Moment
from membench.worker.tracing.traced_case import traced

_NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def _suite(technique: str, device: str, layers: int = 9, **workload: Any) -> Suite:
    overrides = {**_NARROW, "num_hidden_layers": layers, "vocab_size": 1000, "tie_word_embeddings": False}
    return membench.Suite(
        "deep",
        matrix={"model": ["deep"], "technique": [technique], "workload": ["work"], "device": [device]},
        model={"deep": {"use": "config", "source": "llama", "overrides": overrides}},
        workload={"work": workload or {"use": "train", "batch_size": 4, "sequence_length": 32}},
    )


def _request(suite: Suite, technique: str) -> tuple[MeasureCase, Device]:
    case = next(each for each in suite.cases if each.technique == technique)
    members = technique.split("+")
    request = MeasureCase(
        case.model_plugin, case.technique_plugins, members, case.workload_plugin, 0, Steps(1, 1),
        ReferenceLogits("", False),
    )  # fmt: skip
    return request, Device.parse(case.device)


def _both(technique: str, device: str, tmp_path: Path, **workload: Any) -> tuple[RankEstimate, RankEstimate]:
    request, on = _request(_suite(technique, device, 9, **workload), technique)
    (few,), (all_layers,) = extrapolated(request, on, tmp_path), traced(request, on, None, tmp_path)
    return few, all_layers


@pytest.mark.parametrize(
    ("technique", "device"),
    [
        ("bf16+checkpointing+fsdp", "4xcuda"),
        ("ddp", "2xcuda"),
    ],
)
def test_few_layers_tell_to_the_byte_what_all_layers_need(technique: str, device: str, tmp_path: Path) -> None:
    few, all_layers = _both(technique, device, tmp_path)
    assert few.from_layers[:2] == (3, 4)
    assert few.peak_part == all_layers.peak_part
    for field in ("peak_live_bytes", "backward_peak_live_bytes", "weights_bytes", "optimizer_state_bytes"):
        assert few.figures[field] == all_layers.figures[field], field


def test_a_prompt_and_its_cache_are_extrapolated_too(tmp_path: Path) -> None:
    few, all_layers = _both("bf16", "cuda", tmp_path, use="generate", batch_size=2, prompt_length=64, new_tokens=4)
    assert few.from_layers
    assert few.figures["peak_live_bytes"] == all_layers.figures["peak_live_bytes"]


def test_a_model_that_is_hardly_deeper_is_traced_whole(tmp_path: Path) -> None:
    request, on = _request(_suite("none", "cuda", layers=8), "none")
    (found,) = extrapolated(request, on, tmp_path)
    assert found.from_layers == ()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own module of ZeRO
def test_shares_of_all_parameters_are_not_extrapolated(tmp_path: Path) -> None:
    few, all_layers = _both("zero1", "2xcuda", tmp_path)
    assert few.from_layers == ()
    assert few.figures["peak_live_bytes"] == all_layers.figures["peak_live_bytes"]


def _moments(*lives: int, part: str = "forward", what: str = "abc") -> list[Moment]:
    return [Moment(part, (what[number],), live) for number, live in enumerate(lives)]


def test_another_moment_may_be_the_highest_once_layers_are_added() -> None:
    # The first moment has 100 and 1 more a layer, the last 10 and 20 more: with nine layers more they are 109 and 190.
    fewer, more = _moments(100, 10, what="ab"), _moments(101, 5, 30, what="aLb")
    assert max(live for _, live in extended((fewer, more), 9)) == 190


def test_models_that_differ_otherwise_are_not_extrapolated() -> None:
    with pytest.raises(Unlike):
        list(extended((_moments(1, 2, 3, what="abc"), _moments(1, 2, 3, what="xyz")), 2))
    with pytest.raises(Unlike):
        list(extended((_moments(1, part="forward"), _moments(1, part="backward")), 2))


def test_layers_that_differ_have_no_depth() -> None:
    from membench.builtin.models.config import Config

    alike = Config.model_validate({"source": "llama", "overrides": {"num_hidden_layers": 6}})
    assert alike.depth() == 6
    assert alike.with_depth(2).depth() == 2
    mixed = Config.model_validate({"source": "gemma3_text", "overrides": {"num_hidden_layers": 12}})
    assert mixed.depth() is None
    assert complaint(Config, membench.plugins.Model) is None
