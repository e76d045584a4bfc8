"""Notes that explain, in bytes, why a technique saved more or less than its nominal factor.

The causes are found in the storages of the module, the optimizer and the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from membench.plugins import Parallel
from membench.units import format_bytes, format_ratio
from membench.worker.breakdown import named_tensors_in
from membench.worker.storages import Storages, inner_tensors, local_part, plain_tensors
from membench.worker.weights import own_tensors, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.plugins import Context, Technique, Workload

_LARGEST_DEVIATION = 0.2
"""The relative deviation from the nominal factor above which a note is made."""

_MISSING_STATES = "of states not yet made"
_SCALES_OF_A_CACHE = ("scale", "lowest")
_MOMENTS = 2
"""AdamW keeps so many numbers per parameter, of its type. Nominal factors of optimizer states are relative to these."""
_SCALES = ("scale", "zero", "absmax", "offset", "code", "quant_map", "factor", "nf4", "SCB")


@dataclass(frozen=True)
class PlainWeights:
    """The weights of the model as it is built, before any technique. Nominal factors are relative to these.

    Attributes:
        bytes: of all weights.
        bits: of one weight, the mean where they differ.
    """

    bytes: int
    bits: float

    @classmethod
    def of(cls, module: nn.Module) -> PlainWeights:
        """Return those of a module; on the meta device, those that it would have."""
        numbers = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
        count = sum(parameter.numel() for parameter in numbers)
        return cls(weight_bytes(module), 8 * sum(parameter.nbytes for parameter in numbers) / count if count else 32)


def on_weights_and_states(
    module: nn.Module, context: Context, techniques: Sequence[Technique], plain: PlainWeights | None
) -> list[str]:
    """Return the notes of ``on_weights`` and ``on_states`` on a case after its steps."""
    found = on_weights(module, techniques, plain)
    if (optimizer := context.inventory.get("optimizer")) is None:
        return found
    states: Mapping[torch.Tensor, Mapping[str, Any]] = optimizer()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if any(isinstance(each, Parallel) and each.shares_states for each in techniques):
        trained = [parameter for parameter in trained if states.get(parameter)]
    return found + on_states(states, trained, techniques, 32 if plain is None else plain.bits)


def on_weights(module: nn.Module, techniques: Sequence[Technique], plain: PlainWeights | None) -> list[str]:
    """Return a note if the size of the weights is more than 20% off the stack's nominal factor.

    Where ranks share the weights, the factor is one of this rank's share of them.

    Args:
        plain: the weights before any technique; ``None``: not known, and then no note is made.
    """
    if plain is None or not plain.bytes:
        return []
    bits = [stated for technique in techniques if (stated := technique.nominal_bits()) is not None]
    share, own_share = _nominal_share(techniques), _share_of_rank(module)
    if share is None:
        return []
    if own_share == 1 and any(isinstance(each, Parallel) and each.splits_model for each in techniques):
        return []  # what it leaves on this rank depends on the model
    fewest_bits = min([*bits, plain.bits])
    nominal = fewest_bits / plain.bits * share * own_share
    measured = weight_bytes(module) / plain.bytes
    if abs(measured / nominal - 1) <= _LARGEST_DEVIATION:
        return []
    adapted = any(technique.trains_adapters for technique in techniques)
    causes = _causes(module, fewest_bits, adapted, share < 1)
    return [_note("weights", measured, nominal, causes)]


def _nominal_share(techniques: Sequence[Technique]) -> float | None:
    """Return the nominal share of the weights that a stack leaves on all ranks together; ``None``: not known."""
    share = 1.0
    for technique in techniques:
        left = 1.0 if isinstance(technique, Parallel) else technique.nominal_share()
        if left is None:
            return None
        share *= left
    return share


def _share_of_rank(module: nn.Module) -> float:
    """Return which share of the numbers in a module's parameters this rank has; 1 unless ranks share tensors."""
    parameters = list(module.parameters())
    own, whole = (sum(each.numel() for each in counted) for counted in (map(local_part, parameters), parameters))
    return own / whole if whole else 1.0


def on_states(
    states: Mapping[torch.Tensor, Mapping[str, Any]],
    trained: Iterable[torch.Tensor],
    techniques: Sequence[Technique],
    built_bits: float = 32,
) -> list[str]:
    """Return a note if the size of the optimizer states is more than 20% off the nominal factor of a technique.

    Args:
        states: the states by parameter, as in ``torch.optim.Optimizer.state``.
        trained: the parameters that the optimizer updates; of those that ranks share, this rank's parts count.
        built_bits: of a weight as the model is built. A cast is a technique of its own; what is trained in a wider type
            than the weights, such as adapters, is compared with AdamW on that.
    """
    stated = [(size, technique) for technique in techniques if (size := technique.nominal_state_bytes()) is not None]
    parameters = list(trained)
    counts = [local_part(parameter).numel() for parameter in parameters]
    sizes = (max(parameter.element_size(), built_bits / 8) for parameter in parameters)
    adamw_bytes = _MOMENTS * sum(count * each for count, each in zip(counts, sizes, strict=True))
    if not stated or not adamw_bytes:
        return []
    size, technique = stated[-1]
    found, causes = Storages(), dict[str, int]()
    nominal_bytes = 0.0
    for parameter, count in zip(parameters, counts, strict=True):
        kept = states.get(parameter, {})
        tensors = {
            name: value for name, value in kept.items() if hasattr(value, "untyped_storage") and value.numel() > 1
        }
        # What keeps states in the type of what it trains is known for its bytes in fp32, unless it casts by itself.
        follows = technique.nominal_bits() is None and {value.dtype for value in tensors.values()} == {parameter.dtype}
        each = size * parameter.element_size() / 4 if follows and not _is_quantized(tensors) else size
        nominal_bytes += each * count
        if not tensors:
            _add(causes, _MISSING_STATES, int(size * count))
        for name, tensor in tensors.items():
            for inner, plain in _named_plain(name, tensor):
                if size_bytes := found.add(plain):
                    _add(causes, _cause_of_state(name, inner, plain), size_bytes)
    measured, nominal = found.bytes / adamw_bytes, nominal_bytes / adamw_bytes
    if abs(measured / nominal - 1) <= _LARGEST_DEVIATION:
        return []
    causes.pop("", None)
    return [_note("optimizer states", measured, nominal, causes)]


def _is_quantized(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(hasattr(local_part(tensor), "__tensor_flatten__") for tensor in tensors.values())


def on_cache(cache: Any, numbers: int, techniques: Sequence[Technique], built_bits: float = 32) -> list[str]:
    """Return a note if the size of the key-value cache is more than 20% off the nominal factor of a technique.

    Args:
        cache: the object that holds the tensors of the cache.
        numbers: how many numbers the same cache has without techniques, each of ``built_bits``.
    """
    bits = [stated for technique in techniques if (stated := technique.nominal_cache_bits()) is not None]
    if not bits or not numbers:
        return []
    found, causes = Storages(), dict[str, int]()
    for name, tensor in named_tensors_in(cache):
        if size := found.add(tensor):
            type_name = str(tensor.dtype).removeprefix("torch.")
            if name in _SCALES_OF_A_CACHE:
                _add(causes, f"of scales and minima in {type_name}", size)
            elif tensor.is_floating_point():
                _add(causes, f"of the newest tokens, not quantized yet, in {type_name}", size)
    measured, nominal = found.bytes / (numbers * built_bits / 8), min(*bits, built_bits) / built_bits
    if abs(measured / nominal - 1) <= _LARGEST_DEVIATION:
        return []
    return [_note("keys and values", measured, nominal, causes)]


def on_cache_of(context: Context, workload: Workload, techniques: Sequence[Technique], built_bits: float) -> list[str]:
    """Return a note on the key-value cache of a case as ``on_cache`` does; none if nothing says how large it has to be.

    Args:
        built_bits: of a weight as the model is built.
    """
    tokens, shape, cache = workload.cached_tokens(), context.model.shape, context.inventory.get("cache")
    if tokens is None or shape is None or cache is None:
        return []
    if _nominal_share(techniques) != 1:
        return []  # the technique changes the model's shape, and with it the size of the cache
    numbers = 2 * shape.layers * shape.key_value_heads * (shape.width // shape.heads) * tokens
    if context.ranks is not None:
        members = [technique for technique in techniques if isinstance(technique, Parallel)]
        sharing = {each.dimension for each in members if each.shares_batch or each.dimension == "tensor"}
        numbers //= math.prod(context.ranks.degree(dimension) for dimension in sharing)
    return on_cache(cache(), numbers, techniques, built_bits)


def _cause_of_state(name: str, inner: str, plain: torch.Tensor) -> str:
    """Describe a tensor of a state that is not quantized codes; empty for codes."""
    if inner == "codes":
        return ""
    type_name = str(plain.dtype).removeprefix("torch.")
    if any(word in inner for word in _SCALES):
        return f"of scales in {type_name}"
    if "qmap" in inner:
        return f"of tables of values in {type_name}"
    if name == "master":
        return f"of a copy of the weights in {type_name}"
    return f"of moments in {type_name}" if plain.element_size() > 1 else ""


def _add(causes: dict[str, int], cause: str, size: int) -> None:
    causes[cause] = causes.get(cause, 0) + size


def _note(what: str, measured: float, nominal: float, causes: Mapping[str, int]) -> str:
    """Format the note. Only missing states can explain a factor below the nominal one."""
    if measured < nominal:
        causes = {cause: size for cause, size in causes.items() if cause == _MISSING_STATES}
    largest_first = sorted(causes.items(), key=lambda cause: -cause[1])
    unnamed = "more was saved" if measured < nominal else "no cause was found"
    named = ", ".join(f"{format_bytes(size)} {cause}" for cause, size in largest_first if size) or unnamed
    return f"{what} are {format_ratio(measured)} where {format_ratio(nominal)} is the nominal factor: {named}"


def _causes(module: nn.Module, bits: float, adapted: bool, pruned: bool) -> dict[str, int]:
    """Return the bytes by cause for which the weights take more than ``bits`` per weight; each storage counts once.

    Args:
        adapted: whether a technique adds trainable adapters to the weights.
        pruned: whether a technique removes weights; then unpruned layers and zeros that are stored are causes, too.
    """
    head = getattr(module, "get_output_embeddings", lambda: None)()
    found: dict[str, int] = {}
    storages = Storages()
    for _, child in module.named_modules():
        for name, tensor in own_tensors(child):
            for inner, plain in _named_plain(name, tensor):
                size_bytes = storages.add(plain)
                if not size_bytes:
                    continue
                cause = _cause(child, child is head, name, inner, tensor, plain, bits, pruned)
                if pruned and cause is None and (zeros := _zero_bytes(plain)):
                    kind = f"of zeros in {str(plain.dtype).removeprefix('torch.')}"
                    _add(found, kind, zeros)
                if adapted and tensor.requires_grad:
                    cause = f"of adapters in {str(plain.dtype).removeprefix('torch.')}"
                if cause:
                    _add(found, cause, size_bytes)
    return found


def _zero_bytes(plain: torch.Tensor) -> int:
    """Return the bytes of the zeros in a matrix of floating-point numbers of at least 16 bits; else 0."""
    if plain.ndim < 2 or not plain.is_floating_point() or plain.element_size() < 2:
        return 0
    return (plain.numel() - int(plain.count_nonzero())) * plain.element_size()


def _named_plain(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    tensor = local_part(tensor.data)
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, plain) for plain in plain_tensors(tensor)]
    return [(name, plain) for name, inner in inner_tensors(tensor) for plain in plain_tensors(inner)]


def _cause(
    layer: nn.Module,
    is_head: bool,
    name: str,
    inner: str,
    tensor: torch.Tensor,
    plain: torch.Tensor,
    bits: float,
    pruned: bool,
) -> str | None:
    import torch

    type_name = str(plain.dtype).removeprefix("torch.")
    if name == "mask" or name.endswith("_mask"):
        return f"masks in {type_name}"
    if name.endswith("_orig"):
        return f"originals kept beside the masked weights in {type_name}"
    if any(word in inner for word in _SCALES) and (
        plain.numel() < local_part(tensor).numel() or not isinstance(tensor, torch.nn.Parameter)
    ):
        return f"scales and zero points in {type_name}"
    if "indices" in inner:
        return f"indices of sparse values in {type_name}"
    stored_bits = plain.element_size() * 8
    if bits < 8 and plain.dtype in (torch.int8, torch.uint8):
        # Packed codes have fewer elements than the weights, or are stored in a plain tensor.
        packed = inner == name or plain.numel() < local_part(tensor).numel()
        return None if packed else f"of {bits:g}-bit weights stored a byte each"
    if stored_bits <= bits and not pruned:
        return None
    if is_head:
        return f"of the output head left in {type_name}"
    if type(layer).__name__ == "Embedding":
        return f"of embeddings left in {type_name}"
    if "norm" in type(layer).__name__.lower():
        return f"of norms left in {type_name}"
    return None if stored_bits <= bits else f"of {type(layer).__name__} layers left in {type_name}"
