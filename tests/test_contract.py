"""The contract: printed on one screen, and checked when a plug-in is loaded."""

from __future__ import annotations

import inspect
import textwrap
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import membench
from membench import plugins
from membench.cli import main
from membench.errors import PluginError
from membench.plugins import registry
from membench.plugins.checking import complaint
from membench.plugins.options import CONTRACT_VERSION
from membench.plugins.screen import contract_lines
from tests.installing import install

_CLASSES = ("Options", "Technique", "SelectsLayers", "LayerWise", "Model", "Workload", "QualityMetric")


def test_the_contract_fits_one_screen_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "contract"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 120
    assert text == "".join(f"{line}\n" for line in contract_lines())
    assert "CONTRACT_VERSION = 1" in text
    assert "Promise: " in text


@pytest.mark.parametrize("name", _CLASSES)
def test_every_stage_and_class_variable_is_on_the_screen(name: str) -> None:
    owner = getattr(plugins, name)
    text = "\n".join(contract_lines())
    declared = text.partition(f"class {name}(")[2].partition("\nclass ")[0].splitlines()
    for stage, function in vars(owner).items():
        if not stage.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            (line,) = [line for line in declared if line.startswith(f"    def {stage}(")]
            called = function.fget if isinstance(function, property) else function
            assert called is not None
            assert all(argument in line for argument in inspect.signature(called).parameters)
            assert line.endswith("  # must be there") == (stage in owner.required)
    variables = inspect.get_annotations(owner).keys() - {"model_config", "required"}
    assert {line.partition(":")[0].strip() for line in declared if " = " in line} == variables


_VERSION_1 = {
    "Technique": [
        "acts_on", "devices", "needs", "applies_rest", "prepares_rest", "trains_adapters", "needs_all_gradients",
        "check(setting)", "refuse(setting)", "nominal_bits()", "nominal_cache_bits()", "nominal_state_bytes()",
        "nominal_share()", "corpus(documents, context)", "data_storage(storage, context)", "samples(samples, context)",
        "prepare(make, context)", "load(build, rest, context)", "apply(module, context)",
        "optimizer(optimizer, module, context)", "step_context(context)", "training_step(step, context)",
        "generate_options(options, context)", "remark(module, context)",
    ],
    "SelectsLayers": ["keeps_layers", "skip", "only", "selects(name)", "check_patterns(names, context)"],
    "LayerWise": [
        "convert(name, layer, head)", "converted(name, layer, head, context)", "for_rehearsal(context)",
    ],
    "Model": [
        "gives_logits", "quality", "shape", "check()", "prepare(progress)", "build(context)", "skeleton()",
        "miniature()", "vocabulary(module)", "encode(text)", "token_ends(text)", "max_tokens()", "needed_bytes()",
    ],
    "Workload": [
        "trains", "check()", "longest_sequence()", "tokens_per_step()", "corpus()", "samples()", "steps_in_all()",
        "examine(module, techniques, context)", "decoded_tokens_per_step()", "cached_tokens()",
        "logits(module, ids, techniques, context)", "start(module, tokens, techniques, context)",
    ],
    "QualityMetric": ["unit", "better", "measure(module, held_out, context)"],
}  # fmt: skip


@pytest.mark.parametrize("name", _VERSION_1)
def test_the_classes_have_every_stage_and_argument_that_version_1_promises(name: str) -> None:
    assert CONTRACT_VERSION == 1
    owner = getattr(plugins, name)
    for promised in _VERSION_1[name]:
        stage, is_called, arguments = promised.partition("(")
        assert hasattr(owner, stage) or stage in inspect.get_annotations(owner), promised
        if is_called:
            found = list(inspect.signature(getattr(owner, stage)).parameters)[1:]
            assert found == [each for each in arguments.rstrip(")").split(", ") if each], promised


def test_the_screen_names_the_entry_point_groups() -> None:
    text = "\n".join(contract_lines())
    for base, group in (("Technique", "techniques"), ("Model", "models"), ("Workload", "workloads")):
        assert f"\nclass {base}(Options):  # membench.{group}\n" in text
    assert "\nclass QualityMetric(Options):  # membench.metrics\n" in text
    assert "membench.suites" in text


def _wrong(text: str, base: str) -> str | None:
    space: dict[str, Any] = {"__name__": "somebody"}
    source = f"from typing import ClassVar\nfrom membench.plugins import *\n{textwrap.dedent(text)}"
    exec(compile(source, "own", "exec", dont_inherit=True), space)
    return complaint(space["Own"], getattr(plugins, base))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def aply(self, module, context): ...",
         "no stage is named 'aply'; did you mean 'apply'? A method of your own begins with '_'"),
        ("def __init__(self, keep): ...",
         "'__init__' is not called with anything of yours: write options as fields with types, 'keep: float = 0.5'"),
        ("def apply(self, module): ...",
         "'apply' lacks the argument 'context': write 'def apply(self, module, context)'"),
        ("def apply(module, context): ...",
         "'apply' has the argument 'module' where 'self' comes: write 'def apply(self, module, context)'"),
        ("def apply(self, context, module): ...",
         "'apply' has the argument 'context' where 'module' comes: write 'def apply(self, module, context)'"),
        ("def apply(self, module, context, device): ...",
         "'apply' needs an argument 'device' that it is not given: write 'def apply(self, module, context)'"),
        ("def apply(self, module, context, *, device): ...",
         "'apply' needs an argument 'device' that it is not given: write 'def apply(self, module, context)'"),
        ("@staticmethod\n    def apply(module, context): ...",
         "'apply' is not a method: write 'def apply(self, module, context)'"),
        ("async def apply(self, module, context): ...",
         "'apply' is a coroutine or a generator; it must be a regular function"),
        ("apply: int = 3", "option 'apply' has the name of a stage"),
        ("only: list[str] = []", "option 'only' = []: a list can change and cannot be hashed; take a tuple"),
        ("devices: ClassVar = 'cuda'", "devices = 'cuda': expected a tuple of names: ('cuda',)"),
        ("presets: ClassVar = {'deep': {'depht': 2}}\n    depth: int = 1",
         "preset 'deep' sets 'depht', which is no option"),
        ("acts_on: str = 'weights'",
         "'acts_on' is no option: write 'acts_on: ClassVar[TYPE] = …', or leave its type out"),
        ("contract: ClassVar[int] = 2", "it was written for version 2 of it, and this membench has 1"),
        ("def apply(self, module, context, again=False): ...", None),
        ("def apply(self, *arguments): ...", None),
        ("def apply(self, module, _context): ...", None),
        ("def apply(self, module, context): ...\n    def apply_all(self): ...\n    def applies(self): ...", None),
        ("def _aply(self): ...", None),
        ("def halve(self, weight): ...", None),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Field name")  # which is what is told here
def test_a_technique_that_would_fail_in_a_run_is_told_when_it_is_loaded(body: str, said: str | None) -> None:
    assert _wrong(f"class Own(Technique):\n    {body}\n", "Technique") == said


def test_an_option_that_the_contract_has_already_cannot_be_one_of_a_plug_in() -> None:
    layer_wise = "class Own(LayerWise):\n    def convert(self, name, layer, head): ...\n"
    assert _wrong(layer_wise, "Technique") is None
    assert _wrong(f"{layer_wise}    skip: int = 3\n", "Technique") == (
        "'skip' is an option that SelectsLayers has already: take another name for yours"
    )


def test_what_has_no_default_must_be_there_in_the_class_or_above_it() -> None:
    assert _wrong("class Own(Model): ...", "Model") == "'build(self, context)' is missing"
    assert _wrong("class Own(LayerWise): ...", "Technique") == "'convert(self, name, layer, head)' is missing"
    assert _wrong("class Own(QualityMetric): ...", "QualityMetric") == (
        "'measure(self, module, held_out, context)' is missing"
    )
    assert _wrong("class Own(QualityMetric):\n    better = 'more'\n", "QualityMetric") == (
        "better = 'more': expected 'lower' or 'higher'"
    )
    assert _wrong("class Above(Model):\n    def build(self, context): ...\nclass Own(Above): ...", "Model") is None
    assert _wrong("class Own(Model):\n    def build(self, context): ...\n    def shape(self): ...", "Model") == (
        "'shape' is a property: write @property above it"
    )


def test_a_workload_says_which_of_its_stages_is_missing() -> None:
    body = "class Own(Workload):\n    def longest_sequence(self): ...\n    def tokens_per_step(self): ...\n"
    assert _wrong(body, "Workload") == "'start(self, module, tokens, techniques, context)' is missing"


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_built_in_keeps_the_contract(kind: str) -> None:
    of_membench = {entry.name for entry in entry_points(group=f"membench.{kind}s") if "builtin" in entry.value}
    families = {family.name: family.error for family in registry.families(kind) if family.name in of_membench}
    assert families == dict.fromkeys(of_membench)


def test_an_installed_plug_in_that_keeps_no_contract_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (
        "from membench.plugins import Technique\nclass Own(Technique):\n    def laod(self, build, rest, context): ...\n"
    )
    install(tmp_path, "other", "[membench.techniques]\nown = other_contract:Own\n", {"other_contract.py": text})
    with pytest.raises(PluginError) as raised:
        registry.create("technique", "own", {})
    assert str(raised.value) == (
        "technique 'own' of other 1.0 (other_contract:Own) does not keep the contract: "
        "no stage is named 'laod'; did you mean 'load'? A method of your own begins with '_'"
    )
    assert membench.load_suite("quickstart").cases
