"""The quantized key-value cache: bytes by formula, rounding within its bound, and a loss that evaluating sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import membench
from membench import plugins
from membench.builtin.models.transformer import Gpt2, Llama
from membench.builtin.techniques.kv_cache import KvCacheInt4, KvCacheInt8
from membench.builtin.techniques.precision import Bf16
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.generate import Generate
from membench.errors import SuiteError
from membench.records.record import Record
from membench.units import format_bytes
from membench.worker.breakdown import tensors_in
from membench.worker.storages import storages

if TYPE_CHECKING:
    import torch
    from torch import nn

_LLAMA = Llama.of_shape(plugins.Shape(64, 2, 4, 2, 192, 512, 256, tied=True))
_GPT2 = Gpt2.of_shape(plugins.Shape(64, 2, 4, 4, 256, 512, 256, tied=True))
_LAYERS, _HEAD_SIZE, _BATCH, _TOKENS = 2, 16, 3, 50
_INT8, _INT4 = KvCacheInt8.model_validate({}), KvCacheInt4.model_validate({})
_GENERATE = Generate.model_validate({})


@contextlib.contextmanager
def _unmarked(name: str) -> Iterator[None]:
    del name
    yield


def _context(model: plugins.Model) -> plugins.Context:
    return plugins.Context("cpu", 0, model, _unmarked, {}, Path())


def _numbers(*shape: int) -> torch.Tensor:
    import torch

    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers[..., 3] *= 20  # keys have channels that stick out
    return numbers


@pytest.mark.parametrize("group_size", [16, 4])
def test_8_bits_are_rounded_to_the_nearest_of_255_levels_of_their_group(group_size: int) -> None:
    import torch

    from membench.builtin.layers.quantized_cache import Quantized

    numbers = _numbers(2, 3, 7, 16)
    quantized = Quantized.of(numbers, 8, group_size)
    for index in [(0, 0, 0), (1, 2, 6)]:
        for start in range(0, 16, group_size):
            group = numbers[index][start : start + group_size]
            scale = float((group.abs().max() / 127).half())
            expected = [min(max(round(float(number) / scale), -127), 127) for number in group]
            assert quantized.integers[index][start : start + group_size].tolist() == expected
            error = (quantized.numbers(torch.float32)[index][start : start + group_size] - group).abs().max()
            assert error <= scale / 2 * 1.001 + 127 * scale / 2**11
    assert quantized.integers.dtype == torch.int8


@pytest.mark.parametrize("group_size", [16, 4])
def test_4_bits_are_the_nearest_of_16_levels_between_the_least_and_the_most_of_their_group(group_size: int) -> None:
    import torch

    from membench.builtin.layers.quantized_cache import Quantized

    numbers = _numbers(2, 3, 7, 16)
    quantized = Quantized.of(numbers, 4, group_size)
    assert quantized.integers.shape == (2, 3, 7, 8)
    read = quantized.numbers(torch.float32)
    for index in [(0, 0, 0), (1, 2, 6)]:
        packed = quantized.integers[index].tolist()
        codes = [byte % 16 for byte in packed] + [byte // 16 for byte in packed]
        for start in range(0, 16, group_size):
            group = numbers[index][start : start + group_size]
            scale = float(((group.max() - group.min()) / 15).half())
            least = float(group.min().half())
            expected = [min(max(round((float(number) - least) / scale), 0), 15) for number in group]
            assert codes[start : start + group_size] == expected
            assert read[index][start : start + group_size].tolist() == pytest.approx(
                [least + code * scale for code in expected], abs=1e-5
            )
            assert (read[index][start : start + group_size] - group).abs().max() <= scale * 0.52


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("number", [0.0, 1e-9, 1.0])
def test_a_group_of_one_value_is_kept(bits: int, number: float) -> None:
    import torch

    from membench.builtin.layers.quantized_cache import Quantized

    numbers = torch.full((1, 1, 1, 16), number)
    assert torch.allclose(Quantized.of(numbers, bits, 16).numbers(torch.float32), numbers, rtol=1e-3, atol=1e-7)


def _read(module: nn.Module, ids: torch.Tensor, at_once: int, *techniques: plugins.Technique) -> tuple[Any, Any]:
    """Logits of ids (B, T), read so many tokens at a time through the stack's cache, and the cache."""
    import torch

    options: dict[str, Any] = {"use_cache": True}
    for technique in techniques:
        options = technique.generate_options(options, _context(_LLAMA))
    logits = []
    with torch.no_grad():
        for some in torch.split(ids, at_once, dim=1):
            output = module(some, **options)
            options["past_key_values"] = output.past_key_values
            logits.append(output.logits)
    return torch.cat(logits, dim=1), options["past_key_values"]


def _ids(batch: int = _BATCH) -> torch.Tensor:
    import torch

    return torch.randint(0, 512, (batch, _TOKENS), generator=torch.Generator().manual_seed(1))


def _expected_bytes(heads: int, bits: int, group_size: int, residual: int, unrounded_bytes: int) -> float:
    """2 · layers · heads · tokens · batch · bytes a head, the newest tokens unrounded."""
    scales = _HEAD_SIZE // group_size * (2 if bits == 8 else 4)
    older = (_TOKENS - residual) * (_HEAD_SIZE * bits / 8 + scales)
    return 2 * _LAYERS * heads * _BATCH * (older + residual * _HEAD_SIZE * unrounded_bytes)


@pytest.mark.parametrize(("group_size", "residual"), [(None, 0), (4, 0), (None, 20), (8, 20)])
@pytest.mark.parametrize("kind", [KvCacheInt8, KvCacheInt4])
@pytest.mark.parametrize(("model", "heads"), [(_LLAMA, 2), (_GPT2, 4)], ids=["llama", "gpt2"])
def test_a_cache_takes_the_bytes_that_bits_and_scales_and_unrounded_tokens_add_up_to(
    model: Any, heads: int, kind: Any, group_size: int | None, residual: int
) -> None:
    technique = kind(group_size=group_size, residual_length=residual)
    for module, unrounded_bytes in (
        (model.build(_context(model)), 4),
        (Bf16().apply(model.build(_context(model)), _context(model)), 2),
    ):
        _, cache = _read(module, _ids(), 7, technique)
        found = sum(storages(tensors_in(cache)).values())
        assert found == _expected_bytes(heads, kind.bits, group_size or _HEAD_SIZE, residual, unrounded_bytes)
        assert cache.get_seq_length() == _TOKENS


@pytest.mark.parametrize("technique", [_INT8, _INT4], ids=repr)
def test_attention_sees_the_same_whether_tokens_come_at_once_or_one_by_one(technique: plugins.Technique) -> None:
    import torch

    module = _LLAMA.build(_context(_LLAMA))
    together, _ = _read(module, _ids(), _TOKENS, technique)
    one_by_one, _ = _read(module, _ids(), 1, technique)
    unrounded, _ = _read(module, _ids(), _TOKENS)
    assert torch.allclose(together, one_by_one, atol=1e-5)
    assert not torch.allclose(together, unrounded, atol=1e-5)


def test_tokens_of_the_residual_are_not_rounded() -> None:
    import torch

    module = _LLAMA.build(_context(_LLAMA))
    residual = KvCacheInt4.model_validate({"residual_length": 20})
    found, _ = _read(module, _ids(), 5, residual)
    unrounded, _ = _read(module, _ids(), 5)
    assert torch.equal(found[:, :20], unrounded[:, :20])
    assert not torch.allclose(found[:, 20:25], unrounded[:, 20:25], atol=1e-5)


def test_evaluating_reads_through_the_cache_that_a_technique_brings_and_only_while_generating() -> None:
    import torch

    module, context, ids = _LLAMA.build(_context(_LLAMA)), _context(_LLAMA), _ids(1)[0]
    with torch.no_grad():
        plain = module(ids[None]).logits[0]
        assert torch.equal(_GENERATE.logits(module, ids, (Bf16(),), context), plain)
        assert torch.equal(Forward.model_validate({}).logits(module, ids, (_INT4,), context), plain)
        through = _GENERATE.logits(module, ids, (Bf16(), _INT4), context)
    assert torch.allclose(through, _read(module, ids[None], _TOKENS, _INT4)[0][0], atol=1e-5)
    assert not torch.allclose(through, plain, atol=1e-5)


def test_without_generating_or_twice_it_is_refused() -> None:
    def refused(workload: plugins.Workload, *before: plugins.Technique) -> str | None:
        return _INT4.refuse(plugins.Setting(_LLAMA, workload, "cpu", before, ()))

    forward = Forward.model_validate({})
    assert refused(forward) == "there is a key-value cache while generating only, and this workload does not generate"
    assert refused(_GENERATE, _INT8) == "the key-value cache is quantized already"
    assert refused(_GENERATE, Bf16()) is None


def _suite(folder: Path, technique: str, settings: str = "") -> Path:
    path = folder / "cache.toml"
    path.write_text(
        f'[suite]\nname = "cache"\n[matrix]\nmodel = ["trained-tiny"]\ntechnique = {technique}\nworkload = ["long"]\n'
        '[workload.long]\nuse = "generate"\nbatch_size = 2\nprompt_length = 700\nnew_tokens = 5\n'
        f"[settings]\nmeasured_steps = 1\nevaluate_s = 600\n{settings}\n"
    )
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("group_size = 5", "group_size = 5 does not divide the 16 numbers of the model's heads"),
        ("group_size = 1", "option 'group_size' = 1: "),
        ("residual_length = -1", "option 'residual_length' = -1: "),
        ("bits = 3", "unknown option 'bits'"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: str, message: str, tmp_path: Path) -> None:
    path = _suite(tmp_path, '["odd"]', f'[technique.odd]\nuse = "kv-cache-int8"\n{options}')
    with pytest.raises(SuiteError) as error:
        membench.load_suite(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("cache")
    path = _suite(folder, '["none", "kv-cache-int8", "kv-cache-int4"]')
    return {record.technique: record for record in membench.run(membench.load_suite(path), output=folder).records}


@pytest.mark.parametrize(
    ("technique", "bytes_a_head"), [("none", 4 * 16), ("kv-cache-int8", 16 + 2), ("kv-cache-int4", 8 + 4)]
)
def test_a_generations_cache_takes_the_bytes_of_its_formula(
    records: dict[str, Record], technique: str, bytes_a_head: int
) -> None:
    assert records[technique].status == "ok", records[technique].message
    tokens = 700 + 5 - 1  # the last new token is not read
    expected = 2 * 2 * 4 * tokens * 2 * bytes_a_head
    assert records[technique].metrics["cache_bytes"] == pytest.approx(expected, rel=0.01)


def test_a_note_names_what_kept_a_cache_of_small_heads_from_its_factor(records: dict[str, Record]) -> None:
    scales_bytes = 2 * 2 * 4 * (700 + 5 - 1) * 2 * 4
    (note,) = records["kv-cache-int4"].notes
    assert note == (
        "keys and values are ×0.19 where ×0.12 is the nominal factor: "
        f"{format_bytes(scales_bytes)} of scales and minima in float16"
    )
    assert records["kv-cache-int8"].notes == ()


def test_what_the_cache_loses_shows_as_quality(records: dict[str, Record]) -> None:
    int8, int4 = records["kv-cache-int8"].metrics, records["kv-cache-int4"].metrics
    bits_per_byte = records["none"].metrics["bits_per_byte"]
    assert bits_per_byte is not None
    assert 0 < (int8["kl_nats"] or 0) < (int4["kl_nats"] or 0) / 10
    assert abs(int8["lost_bits_per_byte"] or 1) < 0.005 * bits_per_byte
    assert (int4["lost_bits_per_byte"] or 0) > (int4["lost_bits_per_byte_standard_error"] or 1)
    assert (int4["kl_nats"] or 0) > 0.001
