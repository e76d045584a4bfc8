"""Layers with a forward or hooks of their own, and weights that others read, do the same under every technique."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest

import membench
from membench.builtin.models.factory import Factory
from membench.builtin.workloads.forward import Forward
from membench.plugins import Context, LayerWise, NotInModel, Technique, Unsuitable, registry, replaced
from membench.plugins.replacing import WeightUse
from membench.records.record import Record
from membench.worker import converted_layers, weight_uses
from membench.worker.assembly import Assembly
from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of while they are imported is not ours

_REPLACING = ("round-to-nearest", "bnb-int8", "csr")
_IN_PLACE = ("int8-weight-only", "int8-dynamic", "fp8-weight-only")
_OPTIONS: dict[str, dict[str, Any]] = {
    "csr": {"use": "magnitude-prune", "sparsity": 0.001, "storage": "csr"},
    "mask": {"use": "magnitude-prune", "sparsity": 0.001},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model(kind: str) -> Factory:
    return Factory.model_validate({"function": f"tests.own_layers:{kind}"})


def _technique(name: str, **options: Any) -> Technique:
    options = {**_OPTIONS.get(name, {}), **options}
    return cast(Technique, registry.create("technique", options.pop("use", name), options))


def _context(kind: str) -> Context:
    model = _model(kind)
    return Context("cpu", 0, model, lambda part: nullcontext(), {}, Path("nowhere"), weight_uses=_uses(kind))


@functools.cache
def _uses(kind: str) -> dict[str, WeightUse]:
    model = _model(kind)
    context = Context("cpu", 0, model, lambda part: nullcontext(), {}, Path("nowhere"))
    uses = weight_uses.find(model, Forward.model_validate({}), context)
    assert uses is not None
    return uses


def _logits(module: nn.Module) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = module.eval()(torch.arange(24)[None] * 7 % 256)
        return logits


def _converted(kind: str, name: str, **options: Any) -> tuple[nn.Module, Context]:
    context = _context(kind)
    return _technique(name, **options).apply(context.model.build(context).eval(), context), context


def _left(context: Context) -> dict[str, str]:
    return {left.path: left.reason for left in context.left_alone}


def _error(kind: str, module: nn.Module) -> float:
    """The distance of the logits from those of the model as it is, relative to these."""
    context = _context(kind)
    plain = _logits(context.model.build(context))
    return float((_logits(module) - plain).norm() / plain.norm())


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("plain", WeightUse()),
        ("scaled", WeightUse()),
        ("squared", WeightUse(own_operation="mul")),
        ("tied", WeightUse()),
    ],
)
def test_a_weight_that_its_own_layer_uses_is_used_by_nobody_else(kind: str, use: WeightUse) -> None:
    assert _uses(kind)["mix"] == use


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("reading", WeightUse("Reading", "Reading")),
        ("multiplying", WeightUse("Multiplying", "Multiplying")),
        ("casting", WeightUse("Casting")),
        ("helped", WeightUse("Helped", "Helped")),
        ("direct", WeightUse()),
        ("not_without_data", WeightUse("Reading", "Reading")),
    ],
)
def test_who_takes_a_weight_past_its_layer_is_seen(kind: str, use: WeightUse) -> None:
    assert _uses(kind)["mix.proj"] == use


@pytest.mark.parametrize("kind", ["scaled", "squared", "hooked", "pre_hooked", "exchanged", "parametrized"])
@pytest.mark.parametrize("name", [*_REPLACING, *_IN_PLACE, "mask"])
def test_a_forward_and_hooks_are_kept_whatever_is_done_to_the_weight(kind: str, name: str) -> None:
    module, context = _converted(kind, name)
    assert _error(kind, module) < (0.06 if name == "fp8-weight-only" else 0.02)
    if name in _REPLACING or kind == "parametrized":
        assert _left(context).keys() == {"mix"}
    else:
        assert _left(context).keys() == ({"mix"} if kind == "squared" and name != "mask" else set())


@pytest.mark.parametrize("name", ["bnb-nf4", "nf4", "qat", "qlora"])
def test_ways_to_four_bits_keep_them_too(name: str) -> None:
    options: dict[str, Any] = {"steps": 1, "learning_rate": 1e-12} if name == "qat" else {}
    if name == "qlora":
        options = {"targets": ["mix"]}
    module, context = _converted("hooked", name, **options)
    assert _error("hooked", module) < 0.2
    assert _left(context) == ({} if name == "nf4" else {"mix": "it has hooks"})


def test_a_subclass_with_no_more_than_other_first_values_is_replaced() -> None:
    module, context = _converted("initialised", "round-to-nearest")
    assert _left(context) == {}
    assert type(module.get_submodule("mix")).__name__ == "PackedLinear"


@pytest.mark.parametrize("kind", ["reading", "multiplying", "helped", "casting", "direct", "encoder"])
@pytest.mark.parametrize("name", [*_REPLACING, *_IN_PLACE, "mask"])
def test_a_weight_that_others_read_is_left_to_them(kind: str, name: str) -> None:
    module, context = _converted(kind, name)
    assert _error(kind, module) < (0.06 if name == "fp8-weight-only" else 0.02)
    reasons = set(_left(context).values())
    if kind == "encoder":
        assert "its weight is read by MultiheadAttention" in reasons
        assert "mix.layers.0.self_attn.out_proj" in _left(context)
    elif kind == "direct" or (kind == "casting" and name not in _REPLACING):
        assert reasons == set()
    else:
        assert _left(context) == {"mix.proj": f"its weight is read by {kind.title()}"}


def test_adapters_are_not_put_where_they_would_be_passed_by() -> None:
    module, context = _converted("reading", "lora", targets=["proj", "head"])
    assert _left(context) == {"mix.proj": "its weight is read by Reading"}
    assert {name.partition(".")[0] for name, p in module.named_parameters() if p.requires_grad} == {"head"}


class _WithoutHead(Factory):
    gives_logits: ClassVar[bool] = False


@pytest.mark.parametrize("name", ["round-to-nearest", "int8-weight-only"])
def test_a_weight_that_others_read_is_left_to_them_in_a_model_that_gives_no_logits(name: str, tmp_path: Path) -> None:
    model = _WithoutHead.model_validate({"function": "tests.own_layers:reading"})
    context = Context("cpu", 0, model, lambda part: nullcontext(), {}, tmp_path)
    case = Assembly(model, (_technique(name),), Forward.model_validate({}), (name,), context).watched()
    assert _error("reading", case.make()) < 0.02
    assert _left(case.context) == {"mix.proj": "its weight is read by Reading"}


@pytest.mark.parametrize("name", ["round-to-nearest", "int8-weight-only"])
def test_a_head_that_is_the_table_is_not_held_twice_where_the_model_does_not_say_so(name: str) -> None:
    module, context = _converted("tied", name)
    assert _left(context) == {"head": "it shares its weight with embed"}
    context = _context("tied")
    assert weight_bytes(module) < weight_bytes(context.model.build(context))


def test_a_layer_that_is_used_in_two_places_is_replaced_in_both() -> None:
    module, _ = _converted("shared", "round-to-nearest")
    assert module.get_submodule("mix.0") is module.get_submodule("mix.2")
    assert _error("shared", module) < 0.02


def test_a_layer_of_renumbered_blocks_is_taken_for_one_of_its_like() -> None:
    from membench.plugins.replacing import use_of

    uses = {"blocks.0.proj": WeightUse("Mixer", "Mixer"), "blocks.1.proj": WeightUse(), "head": WeightUse()}
    assert use_of("blocks.1.proj", uses) == WeightUse()
    assert use_of("blocks.7.proj", uses) == WeightUse("Mixer", "Mixer")
    assert use_of("blocks.7.other", uses) == WeightUse()
    assert use_of("blocks.0.proj", None) is None


def test_what_is_streamed_from_a_file_is_asked_the_same(tmp_path: Path) -> None:
    context = dataclasses.replace(_context("hooked"), scratch=tmp_path)
    streamed, quantizer = _technique("streamed"), _technique("round-to-nearest", skip=["head"])
    streamed.prepare(lambda: context.model.build(context), context)
    module = streamed.load(lambda: context.model.build(context), (quantizer,), context)
    assert _left(context) == {"mix": "it has hooks"}
    assert _error("hooked", module) == 0
    with pytest.raises(NotInModel, match=r"only = \['lm_head'\] matches no layer; there are embed, head, mix"):
        streamed.load(lambda: context.model.build(context), (_technique("nf4", only=["lm_head"]),), context)


class _Halves(LayerWise):
    """A plug-in that asks nobody."""

    acts_on: ClassVar[str] = "weights"

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        from torch import nn

        if not isinstance(layer, nn.Linear):
            return layer
        made = nn.Linear(layer.in_features, layer.out_features, device="meta")
        made.weight, made.bias = nn.Parameter(layer.weight.data.bfloat16().float()), layer.bias
        del layer._parameters["weight"]
        return made


@pytest.mark.parametrize("kind", ["scaled", "hooked", "exchanged", "reading"])
def test_a_plug_in_that_replaces_such_a_layer_gets_it_put_back(kind: str) -> None:
    context = _context(kind)
    module = _Halves.model_validate({}).apply(context.model.build(context), context)
    assert 0 < _error(kind, module) < 0.02
    assert [path.partition(".")[0] for path in _left(context)] == ["mix"]


class _TensorsInPlace(LayerWise):
    """A plug-in that exchanges the weight alone, whatever the layer does with it."""

    acts_on: ClassVar[str] = "weights"

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        from torch import nn
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        if name.startswith("mix"):
            linear: Any = nn.Linear(64, 64)
            quantize_(linear, Int8WeightOnlyConfig())
            layer.weight = linear.weight
        return layer


@pytest.mark.parametrize(
    ("kind", "path", "operation"), [("squared", "mix", "mul"), ("convolving", "mix.conv", "conv1d")]
)
def test_a_plug_in_that_exchanges_a_weight_which_its_layer_works_on_gets_it_put_back(
    kind: str, path: str, operation: str
) -> None:
    context = _context(kind)
    module = _TensorsInPlace.model_validate({}).apply(context.model.build(context), context)
    assert _left(context) == {path: f"its weight goes through {operation}"}
    assert _error(kind, module) == 0


def test_a_technique_that_replaces_a_layer_by_hand_is_told_what_would_be_lost() -> None:
    from torch import nn

    module = _model("hooked").build(_context("hooked"))
    with pytest.raises(Unsuitable, match="'mix' cannot be replaced without loss: it has hooks"):
        replaced(module, "mix", nn.Linear(64, 64))
    around = nn.Sequential(module.get_submodule("mix"))
    assert replaced(module, "mix", around).get_submodule("mix") is around


class _Swaps(Technique):
    """Replaces a layer by itself."""

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        from torch import nn

        module.mix = nn.Linear(64, 64)
        return module


@pytest.mark.parametrize(
    ("kind", "lost"), [("hooked", ["'swaps' dropped what 1 layer did by itself: mix (it has hooks)"]), ("plain", [])]
)
def test_a_technique_that_asks_nobody_and_drops_hooks_is_named_with_the_layer(kind: str, lost: list[str]) -> None:
    case = Assembly(_model(kind), (_Swaps(),), Forward.model_validate({}), ("swaps",), _context(kind))
    case.make()
    assert converted_layers.remarks(case.names, case.techniques, case.context) == lost


def test_it_is_named_where_the_model_was_converted_and_saved_before(tmp_path: Path) -> None:
    context = dataclasses.replace(_context("hooked"), scratch=tmp_path)
    stack = (cast(Technique, registry.create("technique", "saved", {})), _Swaps())
    case = Assembly(_model("hooked"), stack, Forward.model_validate({}), ("saved", "swaps"), context)
    case.prepare()
    said = ["'swaps' dropped what 1 layer did by itself: mix (it has hooks)"]
    assert converted_layers.remarks(case.names, case.techniques, case.context) == said


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"skip": ["mix.0"]}, {"mix.2", "head"}),
        ({"skip": ["mix"]}, {"head"}),
        ({"skip": ["*.?", "embed"]}, {"head"}),
        ({"only": ["mix"]}, {"mix.0", "mix.2"}),
        ({"only": ["mix", "head"], "skip": ["mix.[01]"]}, {"mix.2", "head"}),
    ],
)
@pytest.mark.parametrize("name", ["int8-weight-only", "mask", "qat"])
def test_patterns_of_paths_leave_layers_out(options: dict[str, Any], taken: set[str], name: str) -> None:
    if name == "mask" and "embed" in str(options):
        options = {"skip": ["*.?"]}  # an embedding is none of the layers that it prunes
    module, context = _converted("blocks", name, **options, **({"steps": 1} if name == "qat" else {}))
    converted = {
        path
        for path, child in module.named_modules()
        if hasattr(child._parameters.get("weight"), "qdata")
        or "weight_orig" in child._parameters
        or type(child).__name__ == "PackedLinear"
    }
    assert (converted, _left(context)) == (taken, {})


@pytest.mark.parametrize("name", ["int8-weight-only", "mask", "lora", "bf16", "qat"])
@pytest.mark.parametrize("option", ["skip", "only"])
def test_a_pattern_that_matches_nothing_is_one_line_that_names_what_there_is(name: str, option: str) -> None:
    listed = "mix.proj, head" if name == "mask" else "embed, mix.proj, head"
    with pytest.raises(NotInModel) as caught:
        _converted("reading", name, **{option: ["mixer.*"]})
    assert str(caught.value) == f"{option} = ['mixer.*'] matches no layer; there are {listed}"


def test_what_adapters_leave_out_is_frozen_all_the_same() -> None:
    module, _ = _converted("plain", "lora", targets=["mix", "head"], skip=["head"])
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"mix"}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("own-layers")
    models = "".join(
        f'[model.{kind}]\nuse = "factory"\nfunction = "tests.own_layers:{kind}"\n' for kind in ("encoder", "late")
    )
    (folder / "picky.py").write_text(
        "from membench.plugins import Technique, Unsuitable\n\n\nclass Picky(Technique):\n"
        "    def apply(self, module, context):\n        if not hasattr(module, 'mix'):\n"
        "            raise Unsuitable('there is no mix')\n        return module\n"
    )
    path = folder / "own.toml"
    path.write_text(
        '[suite]\nname = "own"\nplugins = ["picky.py"]\n[matrix]\nmodel = ["late"]\n'
        'technique = ["round-to-nearest", "left-out", "mistyped"]\nworkload = ["short"]\n'
        '[[include]]\nmodel = "encoder"\ntechnique = ["round-to-nearest", "picky"]\nworkload = "short"\n'
        '[workload.short]\nuse = "forward"\nsequence_length = 32\n[settings]\nmeasured_steps = 1\nevaluate_s = 0\n'
        f'[technique.left-out]\nuse = "round-to-nearest"\nskip = ["mix"]\n'
        f'[technique.mistyped]\nuse = "round-to-nearest"\nskip = ["mixer"]\n{models}'
    )
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def test_layers_that_were_left_alone_are_counted_and_named_in_the_record(records: dict[str, Record]) -> None:
    record = records["encoder/round-to-nearest/short/cpu"]
    assert record.status == "ok", record.message
    assert record.remarks == (
        "'round-to-nearest' left 3 layers alone: mix.layers.0.self_attn.out_proj (its weight is read by"
        " MultiheadAttention), mix.layers.0.linear1 (its weight is read by TransformerEncoderLayer),"
        " mix.layers.0.linear2 (its weight is read by TransformerEncoderLayer)",
    )


def test_a_forward_that_a_technique_breaks_names_the_layer_and_how_to_leave_it_out(records: dict[str, Record]) -> None:
    record = records["late/round-to-nearest/short/cpu"]
    assert record.status == "failed"
    assert record.message is not None
    assert (
        "with 'round-to-nearest', the forward pass fails in mix (LateReading); if its layers must stay as they are,"
        ' leave them out: skip = ["mix"] (caused by TypeError: linear()'
    ) in record.message
    assert records["late/left-out/short/cpu"].status == "ok"


def test_a_pattern_that_matches_nothing_fails_the_case_with_one_line(records: dict[str, Record]) -> None:
    record = records["late/mistyped/short/cpu"]
    assert record.status == "failed"
    assert record.message == "skip = ['mixer'] matches no layer; there are embed, mix.proj, head"


def test_what_the_model_that_is_rehearsed_on_lacks_is_not_said_of_the_model(records: dict[str, Record]) -> None:
    record = records["encoder/picky/short/cpu"]
    assert record.status == "ok", record.message
    assert record.remarks == ("'picky' changed nothing in the model",)
    assert "what libraries set up once is in the figures: no small model takes the place of this one" in record.notes
    assert "there is no mix" not in str(record)
