"""Students: the shape they are asked for, the loss written out, the teacher's part in them, what is refused."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import membench
from membench.builtin.models.transformer import Gpt2, Llama, Qwen
from membench.errors import SuiteError
from membench.plugins import Context, Model, Setting, Shape, Technique, Unsuitable, Workload, registry

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHAPE = Shape(width=48, layers=4, heads=6, key_value_heads=3, inner_width=80, vocabulary=256, longest=160, tied=True)
_MODELS: dict[str, Model] = {
    "llama": Llama.of_shape(_SHAPE),
    "qwen": Qwen.of_shape(_SHAPE),
    "gpt2": Gpt2.of_shape(_SHAPE._replace(key_value_heads=6)),
}


@pytest.fixture(scope="module", autouse=True)
def _undisturbed() -> Iterator[None]:
    """On one thread; what libraries warn of while they are imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers.models.auto.modeling_auto
        import transformers.models.gpt2.modeling_gpt2
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _context(model: str = "llama", seed: int = 0) -> Context:
    return Context("cpu", seed, _MODELS[model], lambda name: contextlib.nullcontext(), {}, Path())


def _technique(name: str, **options: Any) -> Any:
    return registry.create("technique", name, options)


def _student(technique: str, model: str = "llama", suite_seed: int = 0, **options: Any) -> Any:
    context = _context(model, suite_seed)
    return _technique(technique, **{"steps": 1, **options}).apply(context.model.build(_context(model)), context)


def _weights(module: nn.Module) -> torch.Tensor:
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def _shape(student: Any) -> tuple[int, ...]:
    """(layers, width, heads, key-value heads, inner width), read from the tensors and the configuration."""
    config = student.config
    if config.model_type == "gpt2":
        layer = student.transformer.h[0]
        width, inner_width = layer.mlp.c_fc.weight.shape
        heads = layer.attn.num_heads
        return len(student.transformer.h), width, heads, heads, inner_width
    layer = student.model.layers[0]
    inner_width, width = layer.mlp.gate_proj.weight.shape
    size = layer.self_attn.head_dim
    queries, keys = (projection.weight.shape[0] for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    return len(student.model.layers), width, queries // size, keys // size, inner_width


@pytest.mark.parametrize("technique", ["distill", "from-scratch"])
@pytest.mark.parametrize(
    ("model", "options", "shape"),
    [
        ("llama", {}, (2, 48, 6, 3, 80)),
        ("llama", {"layers": 3}, (3, 48, 6, 3, 80)),
        ("llama", {"width": 0.5}, (4, 24, 3, 1, 40)),
        ("llama", {"width": 0.3, "layers": 1}, (1, 16, 2, 1, 27)),
        ("qwen", {"width": 0.7}, (4, 32, 4, 2, 53)),
        ("qwen", {"layers": 1}, (1, 48, 6, 3, 80)),
        ("gpt2", {"width": 0.5, "layers": 2}, (2, 24, 3, 3, 40)),
    ],
)
def test_a_student_has_the_layers_and_the_share_of_heads_and_width_asked_for(
    technique: str, model: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    student = _student(technique, model, **options)
    assert _shape(student) == shape
    assert student.get_input_embeddings().weight.shape == (256, shape[1])


def test_a_student_is_in_fp32_whatever_the_teacher_is_in() -> None:
    import torch

    teacher = _MODELS["llama"].build(_context()).to(torch.bfloat16)
    student = _technique("distill", steps=1).apply(teacher, _context())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_a_student_that_starts_from_a_teacher_with_hooks_is_refused_as_it_would_have_none() -> None:
    teacher: Any = _MODELS["llama"].build(_context())
    teacher.model.layers[0].mlp.up_proj.register_forward_hook(lambda layer, inputs, output: output * 2)
    with pytest.raises(Unsuitable, match=r"'model.layers.0.mlp.up_proj' is more than those: it has hooks$"):
        _technique("distill", steps=1, start="teacher").apply(teacher, _context())


def test_softened_kl_is_the_mean_of_the_divergences_from_the_teacher_times_the_square_of_the_temperature() -> None:
    import torch

    from membench.builtin.techniques.distillation import softened_kl

    learned, taught = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    total = 0.0
    for own, theirs in zip(learned.view(10, 7), taught.view(10, 7), strict=True):
        ours, wanted = (own / 3).exp() / (own / 3).exp().sum(), (theirs / 3).exp() / (theirs / 3).exp().sum()
        total += sum(float(w * (w / o).log()) for o, w in zip(ours, wanted, strict=True))
    assert softened_kl(learned, taught, 3.0).item() == pytest.approx(9 * total / 10)


def test_a_step_of_distilling_is_one_of_adamw_on_both_losses_mixed() -> None:
    import torch

    from membench.builtin.techniques.inner_training import windows

    options: dict[str, Any] = {"layers": 1, "temperature": 2.0, "alpha": 0.7, "learning_rate": 1e-2, "seed": 5}
    student = _student("distill", "gpt2", **options)

    teacher = _MODELS["gpt2"].build(_context("gpt2")).eval()
    technique = _technique("distill", **options)
    expected = technique.untrained(teacher, _context("gpt2")).train()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    # GPT-2 drops out, and does so here as there: nothing is drawn between its first weights and its forward pass.
    batch = next(windows(expected, _context("gpt2"), 5))
    with torch.no_grad():
        soft = (teacher(batch).logits[:, :-1] / 2).softmax(-1)
    logits = expected(batch).logits[:, :-1]
    divergence = (soft * (soft.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    hard = -logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).mean()
    (0.7 * 4 * divergence + 0.3 * hard).backward()
    optimizer.step()

    # AdamW's first step is as long for the smallest gradient, whose sign hangs on the order of additions.
    same = torch.isclose(_weights(student), _weights(expected), rtol=1e-4, atol=1e-5)
    assert same.double().mean() > 0.999


def test_distilling_by_the_hard_loss_alone_is_training_from_scratch() -> None:
    import torch

    alone = _student("from-scratch", steps=3, layers=1)
    assert torch.equal(_weights(_student("distill", steps=3, layers=1, alpha=0.0)), _weights(alone))
    assert not torch.equal(_weights(_student("distill", steps=3, layers=1, alpha=0.5)), _weights(alone))


def test_the_techniques_seed_is_added_to_the_suites_and_settles_first_weights_and_batches() -> None:
    import torch

    first = _weights(_student("from-scratch", seed=1, suite_seed=2))
    torch.manual_seed(9)
    assert torch.equal(_weights(_student("from-scratch", seed=3)), first)
    assert not torch.equal(_weights(_student("from-scratch", seed=2)), first)
    teacher = _MODELS["llama"].build(_context())
    untrained = [_technique("from-scratch", seed=seed).untrained(teacher, _context()) for seed in (0, 1, 1)]
    assert torch.equal(_weights(untrained[1]), _weights(untrained[2]))
    assert not torch.equal(_weights(untrained[0]), _weights(untrained[1]))


def test_a_student_that_starts_from_the_teacher_has_its_embeddings_and_evenly_chosen_layers() -> None:
    import torch

    teacher: Any = _MODELS["llama"].build(_context())
    student = _technique("distill", layers=2, start="teacher", steps=1, learning_rate=1e-12).apply(teacher, _context())
    for own, theirs in ((0, 0), (1, 2)):
        for mine, kept in zip(
            student.model.layers[own].parameters(), teacher.model.layers[theirs].parameters(), strict=True
        ):
            torch.testing.assert_close(mine, kept)
    torch.testing.assert_close(student.lm_head.weight, teacher.lm_head.weight)
    torch.testing.assert_close(student.model.norm.weight, teacher.model.norm.weight)


def test_a_teacher_whose_weights_are_changed_cannot_be_copied_from() -> None:
    teacher = _technique("magnitude-prune", storage="mask").apply(_MODELS["llama"].build(_context()), _context())
    with pytest.raises(Unsuitable, match="an earlier technique has changed"):
        _technique("distill", start="teacher", steps=1).apply(teacher, _context())


@pytest.mark.parametrize("technique", ["distill", "from-scratch"])
def test_the_teacher_is_gone_afterwards(technique: str) -> None:
    teacher = _MODELS["llama"].build(_context())
    weights = weakref.ref(next(teacher.parameters()))
    student = _technique(technique, steps=2).apply(teacher, _context())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    del teacher
    gc.collect()
    assert weights() is None
    assert all(parameter.grad is None for parameter in student.parameters())


def test_training_from_scratch_gives_the_models_memory_back_before_it_begins() -> None:
    teacher = _MODELS["llama"].build(_context())
    _technique("from-scratch", steps=1).apply(teacher, _context())
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


def test_a_named_model_can_be_the_student() -> None:
    teacher = Llama.of_shape(_SHAPE._replace(vocabulary=32000))
    context = Context("cpu", 0, teacher, lambda name: contextlib.nullcontext(), {}, Path())
    student: Any = _technique("distill", student="llama-15m", steps=1).untrained(teacher.build(context), context)
    assert sum(parameter.numel() for parameter in student.parameters()) == 15_191_712


@pytest.mark.parametrize(
    ("family", "sizes", "inner"),
    [
        ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48}, "fc1"),
        ("GPTNeoX", {"intermediate_size": 80}, "dense_h_to_4h"),
    ],
)
def test_a_student_of_another_family_has_fewer_layers_less_width_and_the_teachers_layers(
    family: str, sizes: dict[str, int], inner: str
) -> None:
    import torch
    import transformers

    config = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 256,
              "max_position_embeddings": 160}  # fmt: skip
    teacher = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**config, **sizes))
    student = _technique("distill", layers=2, width=0.5, steps=1).untrained(teacher, _context())
    into = [child for name, child in student.named_modules() if name.endswith(inner)]
    assert [tuple(layer.weight.shape) for layer in into] == [(40, 24)] * 2
    copied = _technique("distill", layers=2, start="teacher", steps=1, learning_rate=1e-12).apply(teacher, _context())
    found = [
        [child.weight for name, child in module.named_modules() if name.endswith(inner)] for module in (copied, teacher)
    ]
    torch.testing.assert_close(found[0], [found[1][0], found[1][2]])


def test_what_has_no_configuration_of_transformers_has_no_student() -> None:
    import torch

    with pytest.raises(Unsuitable, match="a transformers configuration, which this model has not"):
        _technique("distill").apply(torch.nn.Embedding(256, 8), _context())


def test_what_comes_before_a_student_in_a_stack_and_would_be_lost_is_refused() -> None:
    def reason(name: str, before: str) -> str | None:
        workload: Workload = registry.create("workload", "forward", {})
        setting = Setting(_MODELS["llama"], workload, "cpu", (_technique(before),), ())
        return cast(Technique, _technique(name)).refuse(setting)

    assert (
        reason("from-scratch", "bf16") == "'from-scratch' replaces the model: what comes before it in the stack is lost"
    )
    assert reason("distill", "bf16") is None
    for before in ("checkpointing", "compile", "lora", "qlora"):
        assert reason("distill", before) == (
            "'distill' replaces the model: checkpointing, compile and adapters before it are lost, so put them after it"
        )
    assert reason("from-scratch", "plain-load") is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("layers = 0", "must be at least 1"),
        ("layers = 7", "layers = 7: the teacher has 6"),
        ("layers = 6", "as large as its teacher"),
        ("width = 0.95", "as large as its teacher"),
        ("width = 1.5", "must be at most 1"),
        ("temperature = 0", "must be more than 0"),
        ("alpha = 1.5", "must be at most 1"),
        ("steps = 0", "must be at least 1"),
        ("text_tokens = 10", "must be at least 256"),
        ('student = "llama-15"', "did you mean 'llama-15m'"),
        ('student = "gpt2-82m"', "student = 'gpt2-82m' knows 50257 token ids, the teacher 32000"),
        (
            'student = "llama-15m"',
            "student = 'llama-15m' is no smaller than its teacher: 6 layers of width 288 and inner width 768, where",
        ),
        ('student = "llama-70b"', "is no smaller than its teacher: 80 layers of width 8192 and inner width 28672"),
        ('student = "llama-15m"\nlayers = 2', "leave those options out"),
        ('start = "teacher"\nwidth = 0.5', "it goes with layers, not with width or student"),
    ],
)
def test_options_that_fit_nothing_refuse_the_suite(option: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        '[suite]\nname = "bad"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["d"]\nworkload = ["forward"]\n'
        f'[technique.d]\nuse = "distill"\n{option}\n'
    )
    with pytest.raises(SuiteError, match=message):
        membench.load_suite(path)


def test_a_named_student_that_is_smaller_than_its_teacher_is_taken() -> None:
    def wrong(teacher: str, student: str) -> str | None:
        setting = Setting(
            registry.create("model", teacher, {}), registry.create("workload", "forward", {}), "cpu", (), ()
        )
        return cast(Technique, _technique("distill", student=student)).check(setting)

    assert wrong("llama-7b", "llama-15m") is None
    assert wrong("gpt2-124m", "gpt2-82m") is None
    assert "no smaller than its teacher" in (wrong("gpt2-82m", "gpt2-124m") or "")
    assert "no smaller than its teacher" in (wrong("trained-tiny", "trained-tiny") or "")
