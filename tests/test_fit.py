"""Which stacks make a model fit: candidates, what they surely need, what they may grow to, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import membench
from membench.errors import MembenchError
from membench.estimating import answers
from membench.estimating.fit import Fit, Question, fit
from membench.estimating.known_costs import KnownCost, known_costs, quality_rank
from membench.estimating.stacks import Stack, Workload, candidates
from membench.units import parse_bytes

_TRAIN = Workload("train", 8, 128)
_SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4000,
    "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip
_PARAMETERS = 4000 * 256 * 2 + 2 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(_SMALL))
    return folder


@pytest.mark.parametrize(
    ("stack", "count", "bytes_a_parameter"),
    [
        ("none", 1, 16),
        ("bf16", 1, 8),
        ("bf16+adamw-8bit", 1, 6),
        ("bf16+step-in-backward", 1, 6),
        ("bf16+adafactor", 1, 4),
        ("bf16+lora", 1, 2),
        ("bf16+nf4+lora", 1, 0.5),
        ("bf16+fsdp", 8, 1),
        ("bf16+fsdp+tensor-parallel", 8, 1),
        ("bf16+zero1", 8, 4.5),
        ("bf16+ddp", 8, 8),
    ],
)
def test_weights_gradients_and_states_are_the_least_that_a_stack_needs(
    stack: str, count: int, bytes_a_parameter: float
) -> None:
    assert Stack.of(stack).least_bytes(1000, _TRAIN, count) == 1000 * bytes_a_parameter


def test_inference_needs_its_weights_at_least() -> None:
    generate = Workload("generate", 1, 128)
    assert Stack.of("bf16").least_bytes(1000, generate, 1) == 2000
    assert Stack.of("bf16+tensor-parallel").least_bytes(1000, generate, 4) == 500


@pytest.mark.parametrize(("kind", "count"), [("train", 1), ("train", 8), ("generate", 1), ("forward", 2)])
def test_all_candidates_exist_and_none_is_tried_twice(kind: str, count: int) -> None:
    found = [stack.name for stack in candidates(Workload(kind, count, 128), count)]
    assert len(found) == len(set(found))
    assert found[0] == "bf16" or count > 1 or found[0] == "none"


def test_more_than_two_hundred_stacks_of_a_training_on_several_devices_are_tried() -> None:
    assert len(candidates(_TRAIN, 8)) >= 200


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "name either the devices"),
        ({"device": "H100-80GB", "memory": "24GB"}, "name either the devices"),
        ({"device": "RTX-4091"}, "did you mean 'RTX-4090'"),
        ({"memory": "24 bananas"}, "24 bananas"),
        ({"memory": "24GB", "length": 1024}, "the model takes 512 tokens at most"),
    ],
)
def test_a_wrong_question_gets_one_line(config: Path, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(MembenchError) as error:
        fit(str(config), **asked)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_does_not_exist_gets_the_nearest() -> None:
    with pytest.raises(MembenchError, match="llama-7b"):
        fit("lama-7b", memory="24GB")


def test_a_model_is_a_name_a_configuration_or_a_function(config: Path) -> None:
    named = Question.asked("llama-7b", None, "24GB", "train", None, None)
    assert (named.model.use, named.workload) == ("llama-7b", Workload("train", 1, 2048))
    for path in (config, config / "config.json"):
        found = Question.asked(str(path), None, "8x80GB", "train", None, None)
        assert (found.model.use, found.name) == ("config", config.name)
        assert found.workload == Workload("train", 8, 512)
        assert found.budget.per_device_bytes == parse_bytes("80GB")


@pytest.fixture(scope="module")
def found(config: Path) -> Fit:
    """What fits into 20 MB, of which training in bf16 with AdamW takes 27 before any activation."""
    return fit(str(config), memory="20MB", batch_size=1, length=64)


def test_what_surely_does_not_fit_is_not_traced(found: Fit) -> None:
    (none,) = [each for each in found.outcomes if each.stack == "none"]
    assert none.verdict == "too large"
    assert none.needed_bytes == pytest.approx(16 * _PARAMETERS, rel=1e-3)  # buffers count as weights
    assert none.how.startswith("arithmetic")


def test_the_stacks_that_fit_need_no_more_than_there_is(found: Fit) -> None:
    assert found.fitting
    for outcome in found.fitting:
        assert outcome.needed_bytes is not None
        assert outcome.needed_bytes <= parse_bytes("20MB")
        assert outcome.how.startswith("traced")
    assert "bf16+lora+checkpointing" in {each.stack for each in found.fitting}


def test_the_largest_batch_fits_and_one_more_row_does_not(found: Fit, config: Path) -> None:
    best = next(each for each in found.fitting if each.largest is not None)
    assert best.largest is not None
    assert not best.is_at_least
    question = Question.asked(str(config), None, "20MB", "train", 1, 64)
    from membench.estimating.lanes import lanes

    stack = Stack.of(best.stack)
    sizes = (best.largest, best.largest + 1)
    jobs = [question.job(stack, Workload("train", size, 64), extrapolates=True) for size in sizes]
    with lanes(jobs) as submit:
        fits, too_large = (submit(job).result().metrics["peak_live_bytes"] for job in jobs)
    assert fits is not None
    assert too_large is not None
    assert fits <= parse_bytes("20MB") < too_large


def test_a_sequence_as_long_as_the_model_takes_is_not_enlarged(config: Path) -> None:
    found = fit(str(config), memory="60MB", workload="forward", batch_size=1, length=512, free="context")
    best = found.fitting[0]
    assert (best.largest, best.is_at_least) == (512, False)


def test_the_answer_says_what_was_not_tried_and_that_costs_are_unknown(found: Fit) -> None:
    said = "\n".join(answers.remarks(found, has_runs=False))
    assert "not tried: pipelines" in said
    assert "is not known: there are no kept runs" in said
    rows = json.loads(answers.table(found, "json"))
    assert {row["verdict"] for row in rows} >= {"fits", "too large"}


def _cost(lost: float | None) -> KnownCost:
    return KnownCost("m", "w", "cpu", 1.1, lost, "KL")


def test_what_lost_nothing_comes_before_what_is_unknown_and_that_before_a_loss() -> None:
    known = {"bf16": [_cost(0.0)], "fsdp": [_cost(0.0)], "nf4": [_cost(0.1)], "zero1": [_cost(None)]}
    ranks = [quality_rank(stack, known) for stack in ("bf16+fsdp", "bf16+zero1", "bf16+nf4")]
    assert ranks == [0, 1, 2]


def test_costs_are_those_of_kept_runs() -> None:
    kept = Path(__file__).parent.parent / "results"
    known = known_costs([kept / "precision@2-cores-epyc.jsonl"])
    assert known["bf16"]
    assert all(cost.time_ratio is None or cost.time_ratio > 0 for costs in known.values() for cost in costs)
    assert "none" not in known


def test_the_command_names_what_keeps_a_stack_from_fitting(config: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "membench",
        "fit",
        str(config),
        "--memory",
        "1MB",
        "--length",
        "64",
        "--why",
        "bf16",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "bf16 does not fit" in run.stdout
    assert "optimizer" in run.stdout
    assert "with bf16+" in run.stdout


def test_a_wrong_device_ends_with_exit_code_2() -> None:
    command = [sys.executable, "-m", "membench", "fit", "llama-7b", "--device", "H100"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "H100-80GB" in run.stderr


def test_fit_is_there_without_torch() -> None:
    program = "import sys, membench; membench.fit; import membench.cli.fit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert membench.fit is fit
