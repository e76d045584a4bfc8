"""Any architecture of transformers by its name or its configuration, and what runs it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

import membench
from membench import plugins, testing
from membench.builtin.models.config import Config
from membench.builtin.models.pretrained import Pretrained
from membench.builtin.techniques import decoder_config
from membench.builtin.workloads.forward import Forward
from membench.cli import main
from membench.records.record import Record
from membench.worker.output_check import refuse_wrong_output

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of while importing is not ours

_BERT = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
}
_T5 = {
    "num_layers": 2,
    "num_decoder_layers": 3,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 64,
    "vocab_size": 300,
}


def _config(source: str, **options: Any) -> Config:
    return Config.model_validate({"source": source, **options})


class TestConfig(testing.ModelConformance):
    model = Config
    options: ClassVar[dict[str, Any]] = {"source": "LlamaForCausalLM", "overrides": {
        "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 300,
    }}  # fmt: skip


def test_a_class_with_overrides_has_as_many_parameters_as_was_published_without_memory() -> None:
    settings = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                "num_key_value_heads": 8, "max_position_embeddings": 4096}  # fmt: skip
    model = _config("LlamaForCausalLM", overrides=settings)
    assert sum(parameter.numel() for parameter in model.skeleton().parameters()) == 68_976_648_192
    assert model.needed_bytes() == 4 * 68_976_648_192
    assert model.max_tokens() == 4096


def test_a_file_its_folder_and_the_name_of_its_type_give_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **_BERT}))
    models = [_config(str(tmp_path)), _config(str(tmp_path / "config.json")), _config("bert", overrides=_BERT)]
    shapes = [[tuple(each.shape) for each in model.skeleton().parameters()] for model in models]
    assert shapes[0] == shapes[1] == shapes[2]
    assert type(models[0].skeleton()).__name__ == "BertForMaskedLM"
    bare: Any = _config(str(tmp_path), architecture="BertModel", overrides={"num_hidden_layers": 2}).skeleton()
    assert (type(bare).__name__, bare.config.num_hidden_layers) == ("BertModel", 2)


def test_a_miniature_is_small_in_all_its_parts_and_of_the_class_with_a_head_for_tokens() -> None:
    small = _config("llava").miniature()
    assert small is not None
    module = small.skeleton()
    assert type(module).__name__ == "LlavaForConditionalGeneration"
    assert sum(parameter.numel() for parameter in module.parameters()) < 1_000_000


def test_a_miniature_has_a_layer_of_each_kind_and_runs() -> None:
    import torch

    small = _config("qwen3_next").miniature()  # three layers of linear attention before the first of the usual kind
    assert small is not None
    module: Any = small.build(_context())
    assert module.config.layer_types == ["linear_attention", "full_attention"]
    with torch.no_grad():
        assert module(torch.arange(8)[None]).logits.shape == (1, 8, 512)


def test_a_class_that_is_built_in_small_sizes_but_does_not_run_has_no_miniature() -> None:
    assert _config("gptj").miniature() is None  # it turns 64 of 32 places of a head


def test_a_configuration_that_refuses_to_say_what_differs_between_layers_is_used_for_what_it_says() -> None:
    model = _config("gemma4_text")
    config: Any = model.skeleton().config
    with pytest.raises(RuntimeError, match="head_dim"):
        _ = config.head_dim
    model.miniature()
    assert decoder_config.number(config, ("head_dim", "hidden_size")) == config.hidden_size
    assert not decoder_config.replace(config, ("head_dim",), 256, 128)
    decoder_config.describe_heads(config, (8, 1), (4, 1), 256)
    assert config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "LlamaForCausualLM"},
         "transformers has no architecture 'LlamaForCausualLM'; did you mean 'LlamaForCausalLM'?"),
        ({"source": "lama"}, "transformers has no model type 'lama'; did you mean 'llama'?"),
        ({"source": "BertModl"}, "transformers has no architecture 'BertModl'; did you mean 'BertModel'?"),
        ({"source": "llama", "overrides": {"num_hidden_layer": 2}},
         "overrides: LlamaConfig has no 'num_hidden_layer'; did you mean 'num_hidden_layers'?"),
        ({"source": "llama", "overrides": {"num_attention_heads": 7}},
         "LlamaConfig refuses this: Class validation error for validator 'validate_architecture': ValueError: The"
         " hidden size (4096) is not a multiple of the number of attention heads (7)."),
        ({"source": "llama", "architecture": "BertModel"},
         "BertModel is built from a BertConfig, and source = 'llama' is a LlamaConfig"),
        ({"source": "ViTModel"}, "ViTModel takes pixel_values, and workloads give token ids"),
    ],
)  # fmt: skip
def test_a_wrong_class_or_setting_is_named_with_what_may_be_meant(options: dict[str, Any], said: str) -> None:
    assert Config.model_validate(options).verify() == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such file or folder"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has neither 'model_type' nor 'architectures'; give 'architecture'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_without_torch(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    wrong = _config(str(path)).check()
    assert wrong is not None
    assert wrong.startswith(f"source = '{path}': ")
    assert said in wrong


def _suite(folder: Path, models: str, cases: str) -> Path:
    path = folder / "architectures.toml"
    path.write_text(
        f'[suite]\nname = "architectures"\n{cases}[workload.few]\nuse = "train"\nsequence_length = 16\n'
        '[workload.new]\nuse = "generate"\nprompt_length = 9\nnew_tokens = 4\n'
        f"[settings]\nwarmup_steps = 1\nmeasured_steps = 1\n{models}"
    )
    return path


def _refused(folder: Path, model: plugins.Model, tokens: int) -> str | None:
    """What is said of a model before anything is measured."""
    try:
        refuse_wrong_output(Forward.model_validate({"sequence_length": tokens}), testing.context(folder, model), "own")
    except plugins.WrongOutput as error:
        return error.problem
    return None


@pytest.mark.parametrize(("source", "most"), [("gpt2", 1024), ("bert", 512), ("roberta", 510), ("t5", None)])
def test_a_model_of_fewer_positions_than_tokens_is_refused_and_one_of_relative_positions_is_not(
    tmp_path: Path, source: str, most: int | None
) -> None:
    assert _refused(tmp_path, _config(source), most or 1100) is None
    if most is not None:
        said = _refused(tmp_path, _config(source), most + 1)
        assert said is not None
        assert said.startswith(f"cannot be run on 1 × {most + 1} token ids: ")


def test_a_pretrained_model_of_fewer_positions_than_tokens_is_refused(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 40, "vocab_size": 300}
    _config("gpt2", overrides=sizes).build(_context()).save_pretrained(tmp_path / "own")  # type: ignore[operator]
    model = Pretrained(source=str(tmp_path / "own"))
    assert _refused(tmp_path, model, 40) is None
    assert _refused(tmp_path, model, 41) == "cannot be run on 1 × 41 token ids: IndexError: index out of range in self"
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_positions_that_are_relative_limit_nothing(tmp_path: Path) -> None:
    for model_type, most in (("t5", None), ("gpt2", 512)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "n_positions": 512}))
        assert _config(str(tmp_path)).max_tokens() == most


def test_a_wrong_class_ends_the_run_with_2_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = '[model.right]\nuse = "factory"\nfunction = "membench.testing:tiny_module"\n'
    models += '[model.wrong]\nuse = "config"\nsource = "bert"\narchitecture = "BertForMaskLM"\n'
    cases = '[matrix]\nmodel = ["right", "wrong"]\ntechnique = ["none"]\nworkload = ["few"]\n'
    path = _suite(tmp_path, models, cases)
    assert main(["run", str(path), "--output", str(tmp_path / "results")]) == 2
    said = "membench: model 'wrong': transformers has no architecture 'BertForMaskLM'; did you mean 'BertForMaskedLM'?"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not list(tmp_path.glob("results/*"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("architectures")
    models = "".join(
        f'[model.{name}]\nuse = "config"\nsource = "{source}"\n[model.{name}.overrides]\n'
        + "".join(f"{key} = {value}\n" for key, value in settings.items())
        for name, source, settings in (("masked", "bert", _BERT), ("bare", "BertModel", _BERT), ("t5", "t5", _T5))
    )
    cases = (
        '[matrix]\nmodel = ["masked", "bare"]\ntechnique = ["none"]\nworkload = ["few", "new"]\n'
        '[[include]]\nmodel = ["t5"]\ntechnique = ["none"]\nworkload = ["new"]\n'
    )
    run = membench.run(membench.load_suite(_suite(folder, models, cases)), output=folder)
    return {record.id: record for record in run.records}


def test_a_model_of_masked_tokens_is_trained_and_what_generates_nothing_is_skipped(records: dict[str, Record]) -> None:
    trained = records["masked/none/few/cpu"]
    assert (trained.status, trained.message) == ("ok", None)
    assert not any("rehearsing" in note for note in trained.notes)
    assert 4 < (trained.metrics["final_loss_nats"] or 0) < 7  # ln 300 = 5.7
    skipped = {name: records[f"{name}/cpu"] for name in ("masked/none/new", "bare/none/few", "bare/none/new")}
    assert {(record.status, record.ended_in) for record in skipped.values()} == {("skipped", None)}
    assert {name: record.message for name, record in skipped.items()} == {
        "masked/none/new": "BertForMaskedLM predicts masked tokens and generates none",
        "bare/none/few": "BertModel has no head that predicts tokens: there is nothing to train it by",
        "bare/none/new": "BertModel has no head that predicts tokens: there is nothing to generate with",
    }


def test_an_encoder_reads_the_prompt_and_a_decoder_caches_its_own_tokens_and_the_encoders(
    records: dict[str, Record],
) -> None:
    record = records["t5/none/new/cpu"]
    assert (record.status, record.message) == ("ok", None)
    assert not any("rehearsing" in note for note in record.notes)
    heads, layers, prompt, decoded = 2 * 8, 3, 9, 4
    assert record.metrics["cache_bytes"] == 2 * 4 * layers * heads * (prompt + decoded)


def test_every_seventh_token_is_masked_and_judged() -> None:
    import torch

    from membench.builtin.workloads.train import token_loss

    module: Any = _config("bert", overrides=_BERT).build(_context())
    module.eval()
    batch = torch.arange(2 * 16).view(2, 16)
    given = batch.clone()
    given[:, ::7] = 299
    with torch.no_grad():
        logits = module(given).logits[:, ::7].flatten(0, 1)
        assert token_loss(module, batch).item() == pytest.approx(
            torch.nn.functional.cross_entropy(logits, batch[:, ::7].flatten()).item(), rel=1e-6
        )


def _context() -> plugins.Context:
    model = testing.Tiny()
    return plugins.Context("cpu", 0, model, lambda name: contextlib.nullcontext(), {}, Path("."))


def test_a_pretrained_encoder_is_of_the_class_that_its_configuration_names(tmp_path: Path) -> None:
    import torch

    _config("BertModel", overrides=_BERT).build(_context()).save_pretrained(tmp_path)  # type: ignore[operator]
    model = Pretrained(source=str(tmp_path))
    assert model.verify() is None
    assert not model.gives_logits
    module = model.build(_context())
    assert type(module).__name__ == "BertModel"
    assert module(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state.shape == (1, 4, 32)
    masked = Pretrained(source=str(tmp_path), architecture="BertForMaskedLM")
    wrong = masked.verify()
    assert wrong is not None
    assert wrong.startswith(f"source = '{tmp_path}': the checkpoint lacks cls.predictions.")


def test_a_pretrained_encoder_decoder_is_built_with_its_weights_and_not_judged_by_text_that_it_reads(
    tmp_path: Path,
) -> None:
    import torch

    built: Any = _config("t5", overrides=_T5).build(_context())
    built.save_pretrained(tmp_path)
    model = Pretrained(source=str(tmp_path))
    assert model.verify() is None
    assert model.unjudged() == "the encoder reads the text that the decoder predicts"
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model.build(_context()).eval()(ids).logits, built.eval()(ids).logits)


def test_a_decoder_that_is_taken_alone_from_an_encoder_decoder_is_judged(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 300}
    more = {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    built: Any = _config("bart", overrides={**sizes, **more}).build(_context())
    built.save_pretrained(tmp_path)
    assert Pretrained(source=str(tmp_path), architecture="BartForCausalLM").unjudged() is None
    assert Pretrained(source=str(tmp_path)).unjudged() == "the encoder reads the text that the decoder predicts"
