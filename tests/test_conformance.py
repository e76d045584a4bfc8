"""What a plug-in's author inherits: who keeps the contract passes, and who breaks a point of it is told which."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from membench import testing
from membench.builtin.known_amounts import Ballast
from membench.builtin.metrics.next_token_accuracy import NextTokenAccuracy
from membench.builtin.techniques.activations import Accumulate
from membench.builtin.techniques.attention import EagerAttention
from membench.builtin.techniques.kv_cache import KvCacheInt8
from membench.builtin.techniques.optimizers import SgdMomentum
from membench.builtin.techniques.precision import Bf16
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.generate import Generate
from membench.builtin.workloads.train import Train
from membench.host import procfs
from membench.plugins import Technique
from tests import misbehaving

MIB = 2**20


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # whoever else uses the machine must not make this slow


def _told(conformance: type, **attributes: Any) -> dict[str, str]:
    """The tests of a class that inherits a conformance class which fail, and what each says."""
    instance = type("TestIt", (conformance,), attributes)()
    found = {}
    for name in (name for name in dir(instance) if name.startswith("test_")):
        try:
            getattr(instance, name)()
        except pytest.skip.Exception:
            pass
        except AssertionError as error:
            found[name.removeprefix("test_")] = str(error)
    return found


@pytest.mark.parametrize(
    "attributes",
    [
        {"technique": misbehaving.Conforming, "options": {"layers": ["mlp"]}},
        {"technique": Bf16},
        {"technique": SgdMomentum},
        {"technique": Accumulate, "options": {"k": 2}},
        {"technique": EagerAttention, "model": testing.tiny_transformer()},
        {
            "technique": KvCacheInt8,
            "model": testing.tiny_transformer(),
            "workload": Generate(batch_size=1, prompt_length=8, new_tokens=2),
        },
    ],
    ids=lambda attributes: attributes["technique"].__name__,
)
def test_a_technique_that_keeps_the_contract_passes(attributes: dict[str, Any]) -> None:
    assert _told(testing.TechniqueConformance, **attributes) == {}


@pytest.mark.parametrize(
    ("technique", "options", "test", "said"),
    [
        ("DoublesItsOption", {"bits": 4}, "its_options_come_back_from_json_as_they_were",
         "option 'bits' was 8 and comes back from JSON as 16; expected a type that JSON keeps"),
        ("Misspells", {}, "it_keeps_the_contract", "Misspells: no stage is named 'aply'; did you mean 'apply'?"),
        ("HoldsALock", {}, "it_can_be_pickled", "HoldsALock cannot be pickled (TypeError: cannot pickle"),
        ("DrawsFromNoSeed", {}, "the_same_seed_gives_the_same_weights_and_logits",
         "the same seed gave other weights the second time: 8 of 24 tensors differ; draw from torch.Generator()"),
        ("MakesNoNumbers", {}, "a_model_still_works_with_it", "the losses of two steps are nan and nan; expected"),
        ("ClaimsTooMuch", {}, "it_saves_the_bytes_that_it_claims",
         "the layers that it changed hold 129.5 KiB; in fp32 they would hold 257.5 KiB, and the technique claims"),
        ("ClaimsNothing", {}, "it_saves_the_bytes_that_it_claims",
         "before, and the technique claims ×1.000 of that (nominal_bits"),
        ("ClaimsStates", {}, "it_saves_the_bytes_that_it_claims",
         "the optimizer keeps 8 bytes for a trained parameter, and nominal_state_bytes claims 2; claim within"),
        ("Hoards", {}, "it_keeps_nothing_beside_the_model",
         "256.0 KiB live beside the model that no layer of it keeps, the largest a Tensor of (192, 64) in float32"),
        ("WantsToComeLast", {}, "it_works_before_another_technique",
         "the stack of WantsToComeLast and then Bf16 ended in RuntimeError: "),
        ("WantsFp32", {}, "it_works_after_another_technique",
         "the stack of Bf16 and then WantsFp32 ended in ValueError: these weights are not in fp32; expected that it"),
    ],
)  # fmt: skip
def test_a_technique_that_breaks_one_point_is_caught_by_the_test_of_that_alone(
    technique: str, options: dict[str, Any], test: str, said: str
) -> None:
    told = _told(testing.TechniqueConformance, technique=getattr(misbehaving, technique), options=options)
    assert list(told) == [test]
    assert said in told[test]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("dtype", "the default dtype was torch.float32 and is torch.float64"),
        ("threads", "the number of threads was"),
        ("grad", "the grad mode was True and is False"),
        ("torch", "torch's random generator was drawn from or seeded"),
        ("python", "Python's random generator was drawn from or seeded"),
        ("numpy", "numpy's random generator was drawn from or seeded"),
        ("variable", "the environment's MEMBENCH_DISTURBED was None and is '1'"),
        ("deterministic", "whether algorithms must be deterministic was False and is True"),
        ("attention", "whether flash attention may be used was True and is False"),
    ],
)
def test_what_a_technique_leaves_behind_is_named_and_put_back(what: str, said: str) -> None:
    class TestIt(testing.TechniqueConformance):
        technique = misbehaving.Disturbs
        options: ClassVar[dict[str, str]] = {"what": what}
        workload = Forward(batch_size=1, sequence_length=16)

    for _ in range(2):  # once more finds the process as it was
        with pytest.raises(AssertionError, match=f"^after applying, {said}") as caught:
            TestIt().test_it_leaves_the_process_as_it_was()
        assert "; expected that a stage puts back what it changes" in str(caught.value)


def test_leaving_something_behind_is_caught_by_the_test_of_that_alone() -> None:
    told = _told(
        testing.TechniqueConformance,
        technique=misbehaving.Disturbs,
        options={"what": "grad"},
        workload=Forward(batch_size=1, sequence_length=16),
    )
    assert list(told) == ["it_leaves_the_process_as_it_was"]


def test_a_module_that_imports_torch_is_caught_by_the_test_of_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_technique.py").write_text(
        "import torch\nfrom membench.plugins import Technique\nclass Heavy(Technique): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import heavy_technique  # type: ignore[import-not-found]

    told = _told(testing.TechniqueConformance, technique=heavy_technique.Heavy)
    assert list(told) == ["its_module_does_not_import_torch_when_it_is_loaded"]
    assert "loading heavy_technique imports torch; expected 'import torch' inside the methods" in str(told)


def test_a_technique_that_cannot_serve_what_it_is_tried_on_says_what_to_set() -> None:
    class OnTiny(testing.TechniqueConformance):
        technique = EagerAttention

    class WhileTraining(testing.TechniqueConformance):
        technique = KvCacheInt8

    with pytest.raises(AssertionError, match=r"none of transformers.*set 'model' or 'workload' of this class"):
        OnTiny().test_a_model_still_works_with_it()
    with pytest.raises(
        AssertionError, match=r"refuses what it would be tried on .*Train: .*; set 'workload' or 'model'"
    ):
        WhileTraining().test_a_model_still_works_with_it()


def test_a_class_that_names_no_technique_and_options_that_do_not_fit_are_told() -> None:
    class Nameless(testing.TechniqueConformance):
        pass

    class Unfit(testing.TechniqueConformance):
        technique = misbehaving.Disturbs
        options: ClassVar[dict[str, str]] = {"what": "nothing"}

    with pytest.raises(AssertionError, match=r"^Nameless names no technique; expected 'technique = YourTechnique'$"):
        Nameless().test_it_can_be_pickled()
    with pytest.raises(
        AssertionError, match=r"^Disturbs does not take the options of this test: option 'what' = 'nothing'"
    ):
        Unfit().test_it_can_be_pickled()


@pytest.mark.parametrize("model", [testing.Tiny, Ballast])
def test_a_model_that_keeps_the_contract_passes(model: type) -> None:
    assert _told(testing.ModelConformance, model=model, options={"mib": 1} if model is Ballast else {}) == {}


@pytest.mark.parametrize(
    ("model", "test", "said"),
    [
        ("BuildsFromNoSeed", "the_same_seed_gives_the_same_weights", "tensors differ; begin 'build' with torch"),
        ("KnowsTooMany", "it_gives_logits_for_every_token_it_knows", "token ids from 0 to 299 ended in IndexError: "),
        ("TakesTooFew", "it_takes_sequences_as_long_as_it_says",
         "256 tokens ended in IndexError: no position is left; max_tokens says that it takes 256"),
        ("OutlinesAnother", "its_skeleton_has_the_shapes_of_what_is_built", "in the skeleton; expected the same"),
        ("NeedsLittle", "it_needs_the_bytes_that_it_says", "needed_bytes says 1000 B, and what is built holds"),
        ("DisturbsWhileBuilding", "it_leaves_the_process_as_it_was",
         "after building, the environment's MEMBENCH_DISTURBED was None and is '1'; expected 'build' to put back"),
    ],
)  # fmt: skip
def test_a_model_that_breaks_one_point_is_caught_by_the_test_of_that_alone(model: str, test: str, said: str) -> None:
    told = _told(testing.ModelConformance, model=getattr(misbehaving, model))
    assert list(told) == [test]
    assert said in told[test]


@pytest.mark.parametrize("workload", [misbehaving.Reads, Train, Generate])
def test_a_workload_that_keeps_the_contract_passes(workload: type) -> None:
    model = testing.tiny_transformer() if workload is Generate else testing.Tiny()
    assert _told(testing.WorkloadConformance, workload=workload, model=model) == {}


@pytest.mark.parametrize(
    ("workload", "test", "said"),
    [
        ("ChangesFromNoSeed", "the_same_seed_gives_the_same_steps", "the same seed gave losses ["),
        ("ChangesWeights", "it_trains_if_it_says_so_and_else_changes_no_weight",
         "steps changed 1 of 24 tensors; set trains = True if they are to"),
        ("AsksNobody", "it_asks_the_stack_for_what_it_does", "2 of 2 forward passes ran outside the contexts"),
        ("ReadsLonger", "no_sequence_is_longer_than_it_says",
         "the model saw 16 tokens in a row, and longest_sequence says 8"),
        ("ReadsFewer", "a_step_works_through_the_tokens_that_it_says",
         "tokens_per_step says 1000, and the model saw 32 a step"),
        ("DisturbsWhileStepping", "it_leaves_the_process_as_it_was", "after a step, the environment's"),
    ],
)  # fmt: skip
def test_a_workload_that_breaks_one_point_is_caught_by_the_test_of_that_alone(
    workload: str, test: str, said: str
) -> None:
    told = _told(testing.WorkloadConformance, workload=getattr(misbehaving, workload))
    assert list(told) == [test]
    assert said in told[test]


@pytest.mark.parametrize("metric", [misbehaving.Constant, NextTokenAccuracy])
def test_a_metric_that_keeps_the_contract_passes(metric: type) -> None:
    assert _told(testing.MetricConformance, metric=metric) == {}


@pytest.mark.parametrize(
    ("metric", "test", "said"),
    [
        ("SaysNoNumber", "its_figure_is_a_finite_number_and_the_same_each_time", "its figure is nan; expected a"),
        ("SaysAnything", "its_figure_is_a_finite_number_and_the_same_each_time", "of the same model it says "),
        ("WritesToTheModel", "it_leaves_the_model_and_the_process_as_they_were",
         "measuring changed 1 of 24 tensors of the model; expected none"),
    ],
)  # fmt: skip
def test_a_metric_that_breaks_one_point_is_caught_by_the_test_of_that_alone(metric: str, test: str, said: str) -> None:
    told = _told(testing.MetricConformance, metric=getattr(misbehaving, metric))
    assert list(told) == [test]
    assert said in told[test]


def test_the_fake_worker_goes_through_the_stages_of_a_stack_in_order() -> None:
    class Told(Technique):
        name: str

        def apply(self, module: Any, context: Any) -> Any:
            stages.append(f"{self.name} in {context.scratch.is_dir()}")
            return module

    stages: list[str] = []
    with testing.FakeWorker([Told(name="first"), Told(name="second")]) as worker:
        losses = [worker.step(), worker.step()]
        scratch = worker.context.scratch
    assert stages == ["first in True", "second in True"]
    assert worker.parts == ["forward", "backward", "optimizer"] * 2
    assert losses[0] is not None
    assert losses[1] is not None
    assert not scratch.exists()


def test_a_stage_can_be_called_with_a_context_alone(tmp_path: Path) -> None:
    module = Bf16().apply(testing.tiny_module(), testing.context(tmp_path))
    assert {str(parameter.dtype) for parameter in module.parameters()} == {"torch.bfloat16"}


def test_what_is_held_is_there_and_what_burst_is_gone() -> None:
    testing.burst("1 MiB")
    before = procfs.resident().private_bytes
    with testing.hold("64 MiB") as held:
        assert held.nbytes == 64 * MIB
        assert procfs.resident().private_bytes - before == pytest.approx(64 * MIB, rel=0.02)
        del held
    assert procfs.resident().private_bytes - before < 2 * MIB
    procfs.reset_peak()
    testing.burst(64 * MIB)
    now = procfs.resident()
    assert now.private_bytes - before < 2 * MIB
    assert now.peak_bytes - now.total_bytes == pytest.approx(64 * MIB, rel=0.05)


def test_importing_it_imports_neither_torch_nor_pytest() -> None:
    code = "import sys, membench.testing; print({'torch', 'pytest', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("set()\n", "")
