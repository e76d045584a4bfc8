"""Pruned models against plain references: how many zeros, which parts, the same logits, the bytes by arithmetic."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import membench
from membench.builtin.models.transformer import Gpt2, Llama, Qwen
from membench.builtin.techniques import sparsity as single_weights
from membench.errors import SuiteError
from membench.plugins import Context, Model, Setting, Shape, Technique, Unsuitable, registry
from membench.records.record import Record
from membench.worker.weights import fingerprint, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHAPE = Shape(width=48, layers=3, heads=6, key_value_heads=3, inner_width=80, vocabulary=96, longest=160, tied=True)
_MODELS: dict[str, Model] = {
    "llama": Llama.of_shape(_SHAPE),
    "qwen": Qwen.of_shape(_SHAPE),
    "gpt2": Gpt2.of_shape(_SHAPE._replace(key_value_heads=6)),
}
_OF_A_BLOCK = {
    "llama": 48 * (6 + 3 + 3 + 6) * 8 + 3 * 48 * 80,
    "qwen": 48 * (6 + 3 + 3 + 6) * 8 + 3 * 48 * 80,
    "gpt2": 4 * 48 * 48 + 2 * 48 * 80,
}
"""Weights of a block's linear layers."""


@pytest.fixture(scope="module", autouse=True)
def _undisturbed() -> Iterator[None]:
    """On one thread, with little text to calibrate on; what libraries warn of while they are imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers.models.auto.modeling_auto
        import transformers.models.gpt2.modeling_gpt2
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    import torch

    from membench.builtin.techniques import importance

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "_PIECES", 6)
        yield
    torch.set_num_threads(threads)


def _context(model: Model, rehearsal: bool = False) -> Context:
    return Context("cpu", 0, model, lambda name: contextlib.nullcontext(), {}, Path(), rehearsal=rehearsal)


def _built(name: str) -> nn.Module:
    """A model in which no bias is zero, nor any two parameters alike."""
    import torch

    module = _MODELS[name].build(_context(_MODELS[name])).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def _technique(name: str, **options: Any) -> Technique:
    return cast(Technique, registry.create("technique", name, options))


def _pruned(model: str, technique: str, **options: Any) -> Any:
    return _technique(technique, **options).apply(_built(model), _context(_MODELS[model]))


def _linear(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers but the output head, of GPT-2's kind too."""
    from torch import nn

    layers = dict(module.named_modules())
    return {
        name: layer
        for name, layer in layers.items()
        if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D") and name != "lm_head"
    }


def _weights(module: nn.Module) -> torch.Tensor:
    import torch

    return torch.cat([cast(Any, layer).weight.detach().flatten() for layer in _linear(module).values()])


def _unpacked(sparse: Any) -> torch.Tensor:
    """The flattened matrix that a sparse layer keeps."""
    import torch

    matrix = torch.zeros(sparse.out_features, sparse.in_features)
    rows = torch.arange(sparse.out_features).repeat_interleave(sparse.row_indices.diff())
    matrix[rows, sparse.column_indices] = sparse.values
    return matrix.flatten()


def _ids() -> torch.Tensor:
    import torch

    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))


def _logits(module: Any) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return cast("torch.Tensor", module(_ids()).logits)


def _cached_logits(module: Any) -> torch.Tensor:
    """The same, a prompt of ten tokens first and then one token after the other, through the key-value cache."""
    import torch

    found, cache = [], None
    with torch.no_grad():
        for piece in [_ids()[:, :10], *(_ids()[:, place : place + 1] for place in range(10, 24))]:
            output = module(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    return torch.cat(found, dim=1)


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    import torch

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- single weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("storage", ["mask", "dense", "csr"])
def test_exactly_the_asked_share_of_all_linear_weights_is_zero(model: str, storage: str) -> None:
    import torch

    whole = 3 * _OF_A_BLOCK[model]
    module = _pruned(model, "magnitude-prune", sparsity=0.37, storage=storage)
    if storage == "csr":
        left = sum(cast(Any, layer).values.numel() for layer in module.modules() if hasattr(layer, "column_indices"))
    else:
        assert _weights(module).numel() == whole
        left = int(torch.count_nonzero(_weights(module)))
    assert left == whole - round(0.37 * whole)
    untouched = _built(model)
    for embedding in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(module, embedding)().weight, getattr(untouched, embedding)().weight)


def test_the_share_is_exact_where_many_weights_are_alike() -> None:
    import torch

    module = _built("llama")
    with torch.no_grad():
        for layer in _linear(module).values():
            weight = cast(Any, layer).weight
            weight.copy_((weight * 20).round().clamp(-3, 3) + 0.5)
    assert len(set(_weights(module).abs().tolist())) < 6
    _technique("magnitude-prune", sparsity=0.5, storage="dense").apply(module, _context(_MODELS["llama"]))
    whole = 3 * _OF_A_BLOCK["llama"]
    assert int((_weights(module) == 0).sum()) == round(0.5 * whole)


@pytest.mark.parametrize(("sparsity", "how_many"), [(1e-9, "none"), (1 - 1e-9, "all")])
def test_a_sparsity_that_prunes_nothing_or_everything_is_unsuitable_but_not_in_a_rehearsal(
    sparsity: float, how_many: str
) -> None:
    whole = 3 * _OF_A_BLOCK["llama"]
    with pytest.raises(Unsuitable, match=rf"prunes {how_many} of {whole:,} weights"):
        _pruned("llama", "magnitude-prune", sparsity=sparsity)
    technique = _technique("magnitude-prune", sparsity=sparsity, storage="dense")
    module = technique.apply(_built("llama"), _context(_MODELS["llama"], rehearsal=True))
    assert int((_weights(module) == 0).sum()) == (0 if how_many == "none" else whole)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_the_weights_that_go_are_those_of_torchs_own_global_pruning(sparsity: float) -> None:
    import torch
    from torch.nn.utils import prune

    reference = _built("qwen")
    layers = [(layer, "weight") for layer in _linear(reference).values()]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=sparsity)
    module = _pruned("qwen", "magnitude-prune", sparsity=sparsity, storage="mask")
    assert torch.equal(_weights(module), _weights(reference))
    assert weight_bytes(module) == weight_bytes(reference)


def test_half_precision_weights_are_pruned_exactly_too() -> None:
    import torch

    module = _built("llama").bfloat16()
    whole = _weights(module)
    _technique("magnitude-prune", sparsity=0.4, storage="dense").apply(module, _context(_MODELS["llama"]))
    left = _weights(module)
    assert int((left == 0).sum()) == round(0.4 * whole.numel())
    assert whole[left == 0].abs().max() <= whole[left != 0].abs().min()
    assert left.dtype == torch.bfloat16


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_sparse_matrices_give_what_dense_zeros_give_cached_or_not(model: str) -> None:
    dense = _pruned(model, "magnitude-prune", sparsity=0.8, storage="dense")
    sparse = _pruned(model, "magnitude-prune", sparsity=0.8, storage="csr")
    assert not _linear(sparse)
    _same(_logits(sparse), _logits(dense))
    _same(_cached_logits(sparse), _logits(dense))


def test_a_sparse_layer_works_in_fp32_where_autocast_would_not() -> None:
    import torch

    sparse = _pruned("llama", "magnitude-prune", sparsity=0.8, storage="csr")
    with torch.autocast("cpu", torch.bfloat16):
        found = _logits(sparse)
    torch.testing.assert_close(found.float(), _logits(sparse), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_sparse_weights_take_eight_bytes_each_and_four_a_row_and_keep_nothing_else_alive(sparsity: float) -> None:
    dense = _built("llama")
    rows = sum(cast(Any, layer).out_features for layer in _linear(dense).values())
    whole, layers = _weights(dense).numel(), len(_linear(dense))
    left = whole - round(sparsity * whole)
    sparse = _pruned("llama", "magnitude-prune", sparsity=sparsity, storage="csr")
    assert weight_bytes(sparse) == weight_bytes(dense) - 4 * whole + 8 * left + 4 * (rows + layers)


@pytest.mark.parametrize(("sparsity", "pays"), [(0.45, False), (0.6, True)])
def test_sparse_storage_begins_to_pay_a_little_above_half(sparsity: float, pays: bool) -> None:
    sparse = _pruned("llama", "magnitude-prune", sparsity=sparsity, storage="csr")
    assert (weight_bytes(sparse) < weight_bytes(_built("llama"))) is pays


@pytest.mark.parametrize("storage", ["mask", "dense", "csr"])
def test_zeros_stay_zeros_while_recovering(storage: str) -> None:
    import torch

    before = _pruned("llama", "magnitude-prune", sparsity=0.6, storage="dense")
    after = _pruned("llama", "magnitude-prune", sparsity=0.6, storage=storage, recover_steps=3)
    if storage == "csr":
        left = torch.cat([_unpacked(layer) for layer in after.modules() if hasattr(layer, "column_indices")])
    else:
        left = _weights(after)
    gone = _weights(before) == 0
    assert not left[gone].any()
    assert not torch.equal(left[~gone], _weights(before)[~gone])
    assert int((left == 0).sum()) == round(0.6 * len(left))
    assert storage == "csr" or not any(cast(Any, layer).weight.grad_fn for layer in _linear(after).values())


def test_the_masked_weight_is_that_of_the_original_as_it_was_trained() -> None:
    import torch

    module = _pruned("gpt2", "magnitude-prune", sparsity=0.6, storage="mask", recover_steps=2)
    for layer in _linear(module).values():
        held = cast(Any, layer)
        assert torch.equal(held.weight, held.weight_orig * held.weight_mask)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_of_every_four_neighbours_stay_the_larger_ones(axis: int) -> None:
    import torch

    from membench.builtin.techniques.sparsity import largest_two_of_four

    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    mask = largest_two_of_four(weight, axis)
    lines = zip(weight if axis else weight.t(), mask if axis else mask.t(), strict=True)
    for numbers, kept in lines:
        for start in range(0, 32, 4):
            four = sorted(range(start, start + 4), key=lambda place: -abs(float(numbers[place])))
            assert {place for place in range(start, start + 4) if kept[place]} == set(four[:2])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_two_of_four_are_packed_and_layers_that_do_not_divide_stay_whole(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    packed: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)

    def pack(weight: torch.Tensor) -> torch.Tensor:
        packed.append(weight)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", pack)
    technique = _technique("semi-structured-2-4")
    with pytest.raises(Unsuitable, match="16-bit weights"):
        technique.apply(_built(model), _context(_MODELS[model]))
    module = _built(model).bfloat16()
    whole = copy.deepcopy(module)
    technique.apply(module, _context(_MODELS[model]))
    divide = [name for name, layer in _linear(whole).items() if all(s % 16 == 0 for s in cast(Any, layer).weight.shape)]
    assert len(divide) == len(packed) == (3 * 4 if model == "gpt2" else 3 * 5)  # keys and values have 24 rows
    for weight in packed:
        assert (torch.count_nonzero(weight.view(-1, 4), dim=1) == 2).all()
    for name, layer in _linear(whole).items():
        if name not in divide:
            assert torch.equal(cast(Any, layer).weight, cast(Any, module.get_submodule(name)).weight)


@pytest.mark.gpu
def test_packed_two_of_four_multiply_as_the_masked_matrix_does() -> None:
    import torch

    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        pytest.skip("2:4 sparse kernels need a CUDA device of capability 8.0 or more")
    from membench.builtin.techniques.sparsity import largest_two_of_four

    layer = torch.nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)
    module = torch.nn.Sequential(copy.deepcopy(layer))
    with torch.no_grad():
        layer.weight.mul_(largest_two_of_four(layer.weight, 1))
    context = Context("cuda", 0, _MODELS["llama"], lambda name: contextlib.nullcontext(), {}, Path())
    _technique("semi-structured-2-4").apply(module, context)
    inputs = torch.randn(32, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(module(inputs), layer(inputs), rtol=2e-2, atol=2e-2)
    assert weight_bytes(module) == pytest.approx(512 * 256 * 2 * 9 / 16 + 2 * 512, rel=0.02)


# --- channels, heads, layers ------------------------------------------------------------------------------------------


def _blocks(module: Any) -> Any:
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


def _sides(model: str, technique: str, block: Any) -> tuple[int, list[tuple[Any, bool, list[list[int]]]]]:
    """How many units a block has, and what each is: of a layer (outputs, inputs) the rows or else columns by unit.

    Written out by hand: a Conv1D is transposed, and a fused layer has queries, keys, values beside each other.
    """
    if technique == "prune-ffn":
        one_each = [[channel] for channel in range(80)]
        mlp = block.mlp
        if model == "gpt2":
            return 80, [(mlp.c_fc, True, one_each), (mlp.c_proj, False, one_each)]
        return 80, [(mlp.gate_proj, True, one_each), (mlp.up_proj, True, one_each), (mlp.down_proj, False, one_each)]
    if model == "gpt2":
        head = [list(range(8 * number, 8 * number + 8)) for number in range(6)]
        fused = [h + [48 + i for i in h] + [96 + i for i in h] for h in head]
        return 6, [(block.attn.c_attn, True, fused), (block.attn.c_proj, False, head)]
    keys = [list(range(8 * number, 8 * number + 8)) for number in range(3)]
    queries = [list(range(16 * number, 16 * number + 16)) for number in range(3)]
    attention = block.self_attn
    return 3, [
        (attention.q_proj, True, queries),
        (attention.k_proj, True, keys),
        (attention.v_proj, True, keys),
        (attention.o_proj, False, queries),
    ]


def _by_hand(model: str, technique: str, block: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    """The sum of ``of(parameter)`` over each unit's own numbers, one at a time."""
    count, sides = _sides(model, technique, block)
    found = [0.0] * count
    for layer, are_rows, units in sides:
        matrix = of(layer.weight).detach()
        matrix = matrix if type(layer).__name__ == "Linear" else matrix.t()
        for number, unit in enumerate(units):
            for index in unit:
                found[number] += float((matrix[index] if are_rows else matrix[:, index]).sum())
                if are_rows and layer.bias is not None:
                    found[number] += float(of(layer.bias).detach()[index])
    return found


def _gone(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda number: scores[number])[:count]


def _without(model: str, technique: str, module: Any, gone: list[list[int]]) -> Any:
    """The full model, where nothing comes out of the units that are gone."""
    import torch

    with torch.no_grad():
        for block, numbers in zip(_blocks(module), gone, strict=True):
            layer, _, units = _sides(model, technique, block)[1][-1]
            for index in [index for number in numbers for index in units[number]]:
                (layer.weight[index] if type(layer).__name__ == "Conv1D" else layer.weight[:, index]).zero_()
    return module


def _calibration(model: str, module: nn.Module) -> Iterator[torch.Tensor]:
    """The text that importance is measured on: six pieces of two windows."""
    from membench.builtin.techniques import inner_training

    batches = inner_training.windows(module, _context(_MODELS[model]), 0)
    return itertools.islice((batch[row : row + 2] for batch in batches for row in range(0, 8, 2)), 6)


def _expected_gone(model: str, technique: str, importance: str, count: int) -> list[list[int]]:
    import torch

    module = _built(model)
    blocks = list(_blocks(module))
    if importance == "magnitude":
        return [_gone(_by_hand(model, technique, block, torch.square), count) for block in blocks]
    sums: list[list[float]] = [[0.0] * _sides(model, technique, block)[0] for block in blocks]
    for piece in _calibration(model, module):
        logits = module(piece).logits[:, :-1]
        module.zero_grad()
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
        loss.backward()
        for total, block in zip(sums, blocks, strict=True):
            found = _by_hand(model, technique, block, lambda p: (p * cast("torch.Tensor", p.grad)).abs())
            total[:] = [a + b for a, b in zip(total, found, strict=True)]
    return [_gone(total, count) for total in sums]


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("technique", ["prune-ffn", "prune-heads"])
@pytest.mark.parametrize("model", _MODELS)
def test_what_is_left_computes_what_the_full_model_does_without_the_least_important_parts(
    model: str, technique: str, importance: str
) -> None:
    count, share = {
        ("prune-ffn", "llama"): (28, 0.35), ("prune-ffn", "qwen"): (28, 0.35), ("prune-ffn", "gpt2"): (28, 0.35),
        ("prune-heads", "llama"): (1, 0.34), ("prune-heads", "qwen"): (1, 0.34), ("prune-heads", "gpt2"): (2, 0.34),
    }[technique, model]  # fmt: skip
    reference = _without(model, technique, _built(model), _expected_gone(model, technique, importance, count))
    module = _pruned(model, technique, share=share, importance=importance)
    _same(_logits(module), _logits(reference))
    _same(_cached_logits(module), _logits(reference))


@pytest.mark.parametrize(
    ("model", "technique", "removed"),
    [
        # A channel: its row in two matrices and its column in the third; GPT-2 has one with a bias, and one.
        ("llama", "prune-ffn", 40 * 3 * 48),
        ("qwen", "prune-ffn", 40 * 3 * 48),
        ("gpt2", "prune-ffn", 40 * (2 * 48 + 1)),
        # Two of three groups: two query heads and a key and a value head of 8 rows each, the queries' columns.
        ("llama", "prune-heads", 2 * (48 * 8 * (2 + 1 + 1 + 2))),
        ("qwen", "prune-heads", 2 * (48 * 8 * (2 + 1 + 1 + 2) + 8 * (2 + 1 + 1))),
        ("gpt2", "prune-heads", 3 * (48 * 8 * 4 + 8 * 3)),
    ],
)
def test_every_block_loses_the_same_number_of_parameters_and_of_bytes(model: str, technique: str, removed: int) -> None:
    full = _built(model)
    module = _pruned(model, technique, share=0.5)
    assert sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in module.parameters()) == 3 * removed
    assert weight_bytes(full) - weight_bytes(module) == 3 * 4 * removed
    for layer in _linear(module).values():
        shape = tuple(cast(Any, layer).weight.shape)
        said = (
            (cast(Any, layer).nx, cast(Any, layer).nf)
            if model == "gpt2"
            else (cast(Any, layer).out_features, cast(Any, layer).in_features)
        )
        assert shape == said


@pytest.mark.parametrize(
    ("model", "technique", "options"),
    [
        ("llama", "prune-ffn", {}),
        ("qwen", "prune-ffn", {}),
        ("gpt2", "prune-ffn", {}),
        ("llama", "prune-heads", {"share": 0.4}),
        ("qwen", "prune-heads", {"share": 0.7}),
        ("llama", "drop-layers", {"share": 0.4}),
        ("qwen", "drop-layers", {"share": 0.4}),
        ("gpt2", "drop-layers", {"share": 0.4}),
    ],
)
def test_a_model_built_from_the_changed_configuration_takes_the_weights(
    model: str, technique: str, options: dict[str, float]
) -> None:
    module = _pruned(model, technique, **options)
    again = type(module)(type(module.config)(**module.config.to_dict())).eval()
    again.load_state_dict(module.state_dict())
    _same(_logits(again), _logits(module))


@pytest.mark.parametrize("model", _MODELS)
def test_the_key_value_cache_shrinks_with_heads_and_layers(model: str) -> None:
    import torch

    with torch.no_grad():
        heads = _pruned(model, "prune-heads", share=0.34)(_ids(), use_cache=True).past_key_values
        layers = _pruned(model, "drop-layers", share=0.34)(_ids(), use_cache=True).past_key_values
    assert heads.layers[0].keys.shape == (2, 4 if model == "gpt2" else 2, 24, 8)
    assert len(heads.layers) == 3
    assert len(layers.layers) == 2
    assert all(layer.keys is not None for layer in layers.layers)


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("least", [0, 1, 2])
def test_the_layer_that_changes_least_is_dropped_wherever_it_stands(model: str, least: int) -> None:
    import torch

    module: Any = _built(model)
    blocks = list(_blocks(module))
    quiet = blocks[least]
    ends = (quiet.attn.c_proj, quiet.mlp.c_proj) if model == "gpt2" else (quiet.self_attn.o_proj, quiet.mlp.down_proj)
    with torch.no_grad():
        for layer in ends:
            for parameter in layer.parameters():
                parameter.mul_(1e-4)
    full = _logits(module)
    _technique("drop-layers", share=0.34).apply(module, _context(_MODELS[model]))
    assert list(_blocks(module)) == [block for block in blocks if block is not quiet]
    assert module.config.num_hidden_layers == 2
    torch.testing.assert_close(_logits(module), full, rtol=1e-2, atol=1e-2)
    _same(_cached_logits(module), _logits(module))


def test_influence_is_one_minus_the_mean_cosine_of_what_goes_in_and_what_comes_out() -> None:
    import torch

    from membench.builtin.techniques.importance import influences

    module: Any = _built("llama")
    found = influences(list(module.model.layers), module.model, _context(_MODELS["llama"]))
    states: list[torch.Tensor] = []
    for layer in module.model.layers:
        layer.register_forward_hook(lambda layer, given, output: states.append(output))
    cosines = []
    with torch.no_grad():
        for piece in _calibration("llama", module):
            states[:] = [module.model.embed_tokens(piece)]
            module(piece)
            pairs = itertools.pairwise(states)
            cosines.append([((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean() for a, b in pairs])
    expected = 1 - torch.tensor(cosines).mean(0)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


# --- what all share ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "options"),
    [
        ("magnitude-prune", {}),
        ("prune-ffn", {"importance": "taylor"}),
        ("prune-heads", {"importance": "taylor", "recover_steps": 1}),
        ("drop-layers", {}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_no_gradient_graph_hook_or_mode_is_left_behind(technique: str, options: dict[str, Any], training: bool) -> None:
    module: Any = _built("llama").train(training)
    module.model.norm.weight.requires_grad_(False)
    before = fingerprint(module)
    _technique(technique, **options).apply(module, _context(_MODELS["llama"]))
    assert fingerprint(module) != before
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad is (name != "model.norm.weight")
        assert not parameter._post_accumulate_grad_hooks
    for part in module.modules():
        assert part.training is training
        assert not part._forward_hooks
        assert not any(getattr(value, "grad_fn", None) for value in vars(part).values())


@pytest.mark.parametrize(
    ("technique", "options", "passes"),
    [
        # Two more, of four tokens, hold what is left against the whole model.
        ("prune-ffn", {"importance": "magnitude"}, 2),
        ("prune-ffn", {"importance": "taylor"}, 3),
        ("prune-heads", {"importance": "taylor", "recover_steps": 100}, 4),
        ("drop-layers", {}, 3),
        ("magnitude-prune", {"recover_steps": 100}, 1),
    ],
)
def test_a_rehearsal_takes_one_piece_of_text_and_one_step(technique: str, options: dict[str, Any], passes: int) -> None:
    module: Any = _built("llama")
    heard: list[None] = []
    module.model.register_forward_pre_hook(lambda *_: heard.append(None))
    _technique(technique, **options).apply(module, _context(_MODELS["llama"], rehearsal=True))
    assert len(heard) == passes


def test_a_rehearsal_goes_on_where_a_miniature_has_a_single_layer() -> None:
    model = Llama.of_shape(_SHAPE._replace(layers=1))
    with pytest.raises(Unsuitable, match=r"share = 0\.9 takes out all of 1 layers"):
        _technique("drop-layers", share=0.9).apply(model.build(_context(model)), _context(model))
    module: Any = _technique("drop-layers", share=0.9).apply(model.build(_context(model)), _context(model, True))
    assert len(module.model.layers) == 1


@pytest.mark.parametrize("technique", ["prune-ffn", "prune-heads", "drop-layers"])
def test_a_model_of_unknown_parts_is_unsuitable_with_the_reason(technique: str) -> None:
    import torch

    with pytest.raises(Unsuitable, match=r"a Sequential has no list of like layers: name them with layers = "):
        _technique(technique).apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), _context(_MODELS["llama"]))


def test_a_model_without_linear_layers_is_unsuitable_with_the_reason() -> None:
    import torch

    with pytest.raises(Unsuitable, match="a Embedding has no linear layers that could be pruned"):
        _technique("magnitude-prune").apply(torch.nn.Embedding(4, 4), _context(_MODELS["llama"]))


def test_weights_that_are_no_plain_numbers_any_more_are_not_pruned() -> None:
    masked = _pruned("llama", "magnitude-prune", storage="mask")
    with pytest.raises(Unsuitable, match="a Linear whose weight is not kept as plain numbers cannot be pruned"):
        _technique("prune-ffn").apply(masked, _context(_MODELS["llama"]))
    sparse = _pruned("llama", "magnitude-prune", storage="csr")
    with pytest.raises(Unsuitable, match="a SparseLinear whose weight"):
        _technique("prune-heads").apply(sparse, _context(_MODELS["llama"]))


@pytest.mark.parametrize(
    ("stack", "workload", "reason"),
    [
        ("int8-weight-only+prune-ffn", "forward", "quantized weights cannot be pruned: let the quantizer come after"),
        ("int8-weight-only+drop-layers", "forward", None),
        ("prune-ffn+int8-weight-only", "forward", None),
        ("lora+magnitude-prune", "forward", "adapters lie beside the weights already: prune first"),
        ("qlora+prune-ffn", "forward", "adapters lie beside the weights already: prune first"),
        ("lora+prune-heads", "train", "adapters lie beside the weights already: prune first"),
        ("lora+drop-layers", "forward", "adapters lie beside the weights already: prune first"),
        ("prune-ffn+lora", "train", None),
        ("magnitude-prune", "train", None),
        ("dense", "train", "training would fill dense zeros again: take storage = 'mask'"),
        ("csr", "train", "sparse weights are multiplied here, not trained: take storage = 'mask'"),
        ("dense+int8-weight-only", "forward", None),
        (
            "magnitude-prune+int8-weight-only",
            "forward",
            "a quantizer takes dense weights, not those of storage = 'mask': take storage = 'dense'",
        ),
        ("csr+bf16", "forward", "on a CPU no kernel multiplies sparse matrices of half precision"),
        ("bf16+csr", "forward", "on a CPU no kernel multiplies sparse matrices of half precision"),
        (
            "semi-structured-2-4",
            "forward",
            "2:4 sparse kernels need a CUDA device of capability 8.0 or more; a CPU has none",
        ),
    ],
)
def test_what_cannot_serve_a_case_says_why(stack: str, workload: str, reason: str | None) -> None:
    def member(name: str) -> Technique:
        storage = {"storage": name} if name in ("dense", "csr") else {}
        return _technique("magnitude-prune" if storage else name, **storage)

    members = [member(name) for name in stack.split("+")]
    reasons = [
        technique.refuse(
            Setting(
                _MODELS["llama"],
                registry.create("workload", workload, {}),
                "cpu",
                tuple(members[:position]),
                tuple(members[position + 1 :]),
            )
        )
        for position, technique in enumerate(members)
    ]
    assert next((found for found in reasons if found), None) == reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('use = "magnitude-prune"\nsparsity = 1.5', "option 'sparsity' = 1.5"),
        ('use = "magnitude-prune"\nsparsity = 0.0', "option 'sparsity' = 0.0"),
        (
            'use = "magnitude-prune"\nstorage = "coo"',
            "option 'storage' = 'coo'",
        ),
        ('use = "magnitude-prune"\nrecover_steps = -1', "option 'recover_steps' = -1"),
        ('use = "prune-ffn"\nshare = 1.0', "option 'share' = 1.0"),
        ('use = "prune-ffn"\nshare = 0.001', "share = 0.001 takes out none of 192 feed-forward channels"),
        (
            'use = "prune-ffn"\nimportance = "luck"',
            "option 'importance' = 'luck'",
        ),
        ('use = "prune-heads"\nshare = 0.9', "share = 0.9 takes out all of 4 key-value heads"),
        ('use = "drop-layers"\nshare = 0.8', "share = 0.8 takes out all of 2 layers"),
        ('use = "drop-layers"\nshare = 0.2', "share = 0.2 takes out none of 2 layers"),
    ],
)
def test_a_bad_option_is_one_line_of_the_suites_error(suite_file: Path, options: str, message: str) -> None:
    suite_file.write_text(
        '[suite]\nname = "bad"\n[matrix]\nmodel = ["trained-tiny"]\ntechnique = ["p"]\nworkload = ["forward"]\n'
        f"[technique.p]\n{options}\n"
    )
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(suite_file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("technique", "options", "share"),
    [
        ("magnitude-prune", {"sparsity": 0.9}, 0.1),
        ("semi-structured-2-4", {}, 0.5),
        ("drop-layers", {"share": 0.25}, 0.75),
        ("prune-ffn", {}, None),  # half of the channels are a share of the weights that depends on the model
        ("prune-heads", {}, None),
    ],
)
def test_the_share_of_the_weights_that_is_known_to_remain(
    technique: str, options: dict[str, float], share: float | None
) -> None:
    found = _technique(technique, **options).nominal_share()
    assert found == (None if share is None else pytest.approx(share))


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("pruning")
    path = folder / "pruning.toml"
    path.write_text(
        '[suite]\nname = "pruning"\n[matrix]\nmodel = ["trained-tiny"]\nworkload = ["forward"]\n'
        'technique = ["prune", "prune-recovered", "ffn", "ffn-recovered", "heads", "heads-recovered", "layers",'
        ' "layers-recovered", "semi-structured-2-4"]\n'
        '[[include]]\nmodel = "llama-15m"\nworkload = "forward"\ntechnique = ["magnitude-prune", "sparse"]\n'
        '[technique.prune]\nuse = "magnitude-prune"\nstorage = "dense"\n'
        '[technique.prune-recovered]\nuse = "magnitude-prune"\nstorage = "dense"\nrecover_steps = 12\n'
        '[technique.ffn]\nuse = "prune-ffn"\nimportance = "taylor"\n'
        '[technique.ffn-recovered]\nuse = "prune-ffn"\nimportance = "taylor"\nrecover_steps = 12\n'
        '[technique.heads]\nuse = "prune-heads"\nimportance = "taylor"\n'
        '[technique.heads-recovered]\nuse = "prune-heads"\nimportance = "taylor"\nrecover_steps = 12\n'
        '[technique.layers]\nuse = "drop-layers"\n'
        '[technique.layers-recovered]\nuse = "drop-layers"\nrecover_steps = 12\n'
        '[technique.sparse]\nuse = "magnitude-prune"\nsparsity = 0.9\nstorage = "csr"\n'
        "[settings]\nmeasured_steps = 1\nthreads = 1\nevaluate_s = 2\n"  # the tiny model needs half a second
    )
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


@pytest.mark.parametrize("technique", ["prune", "ffn", "heads", "layers"])
def test_recovered_is_better_than_not_recovered(records: dict[str, Record], technique: str) -> None:
    lost = [
        cast(float, records[f"trained-tiny/{name}/forward/cpu"].metrics["lost_bits_per_byte"])
        for name in (technique, f"{technique}-recovered")
    ]
    assert 0 < lost[1] < lost[0] - 0.1


_LINEAR_15M = 6 * (4 * 288 * 288 + 3 * 288 * 768)
_ROWS_15M = 6 * (5 * 288 + 2 * 768)


def test_masks_cost_three_times_the_linear_weights_in_live_memory(records: dict[str, Record]) -> None:
    held = [
        cast(int, records[f"llama-15m/{name}/forward/cpu"].metrics["held_live_bytes"])
        for name in ("none", "magnitude-prune")
    ]
    assert held[1] - held[0] == pytest.approx(3 * 4 * _LINEAR_15M, rel=0.03)


def test_sparse_weights_are_live_memory_saved(records: dict[str, Record]) -> None:
    left = _LINEAR_15M - round(0.9 * _LINEAR_15M)
    saved = 4 * _LINEAR_15M - (8 * left + 4 * (_ROWS_15M + 6 * 7))
    none, sparse = (records[f"llama-15m/{name}/forward/cpu"].metrics for name in ("none", "sparse"))
    assert cast(int, none["weights_bytes"]) - cast(int, sparse["weights_bytes"]) == saved
    assert cast(int, none["held_live_bytes"]) - cast(int, sparse["held_live_bytes"]) == pytest.approx(saved, rel=0.08)


def test_making_masks_for_sparse_weights_needs_pieces_of_a_million_beside_them(records: dict[str, Record]) -> None:
    peak = cast(int, records["llama-15m/sparse/forward/cpu"].metrics["apply_peak_live_bytes"])
    loaded = cast(int, records["llama-15m/none/forward/cpu"].metrics["held_live_bytes"])
    assert peak < loaded + 12 * 2**20


def test_each_dense_layer_is_gone_before_the_next_becomes_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _built("llama")
    dense = [weakref.ref(cast(Any, layer).weight) for layer in _linear(module).values()]
    there: list[int] = []
    make_sparse = single_weights._as_sparse

    def count(layer: nn.Module) -> nn.Module:
        there.append(sum(weight() is not None for weight in dense))
        return make_sparse(layer)

    monkeypatch.setattr(single_weights, "_as_sparse", count)
    _technique("magnitude-prune", storage="csr").apply(module, _context(_MODELS["llama"]))
    assert there == list(range(len(dense), 0, -1))


def test_a_note_names_what_keeps_pruned_weights_large(records: dict[str, Record]) -> None:
    (dense,) = records["trained-tiny/prune/forward/cpu"].notes
    # Half of the 106,496 linear weights, and 256 · 64 of the table.
    assert "208.0 KiB of zeros in float32, 64.00 KiB of embeddings left in float32" in dense
    (masked,) = (note for note in records["llama-15m/magnitude-prune/forward/cpu"].notes if "nominal" in note)
    assert "45.56 MiB masks in float32" in masked
    assert "22.78 MiB originals kept beside the masked weights in float32" in masked
    (sparse,) = records["llama-15m/sparse/forward/cpu"].notes
    assert "35.16 MiB of embeddings left in float32, 2.346 MiB indices of sparse values in int32" in sparse


def test_two_of_four_is_skipped_on_a_cpu_with_the_reason(records: dict[str, Record]) -> None:
    record = records["trained-tiny/semi-structured-2-4/forward/cpu"]
    assert record.status == "skipped"
    assert record.message == "2:4 sparse kernels need a CUDA device of capability 8.0 or more; a CPU has none"
