"""The size of a checkpoint, as arithmetic over the state dict; see ``checkpoint``, which writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from membench.worker.storages import plain_tensors

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls types; https://github.com/huggingface/safetensors, ``safetensors/src/tensor.rs``."""
_LENGTH_BYTES = 8
_FILE_BYTES, _STORAGE_BYTES = 1_200, 290
"""What ``torch.save`` (2.13) wrote beside the values of 2 to 200 tensors: for the file, and for each."""


def checkpoint_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of the file that a state dict is saved in.

    With safetensors, where it holds all tensors as they are, it is exact; what ``torch.save`` adds depends on names.
    """
    if all(_is_simple(each) for each in state.values()):
        kept, removed = _without_ties(state)
        if all(each.untyped_storage().nbytes() == each.nbytes for each in kept.values()):
            return _of_safetensors(kept, removed)
    tensors = [each for held in state.values() if isinstance(held, torch.Tensor) for each in plain_tensors(held)]
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return _FILE_BYTES + sum(storages.values()) + _STORAGE_BYTES * len(storages)


def _is_simple(held: Any) -> bool:
    return (
        isinstance(held, torch.Tensor)
        and not hasattr(held.data, "__tensor_flatten__")
        and held.layout is torch.strided
        and held.dtype in _NAMES
        and held.is_contiguous()
    )


def _without_ties(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors under the first of their names, and that name by the others."""
    first: dict[int, str] = {}
    kept: dict[str, torch.Tensor] = {}
    removed: dict[str, str] = {}
    for name in sorted(state):
        tensor = state[name]
        name_kept = first.setdefault(tensor.untyped_storage()._cdata, name) if tensor.numel() else name
        if name_kept == name:
            kept[name] = tensor
        else:
            removed[name] = name_kept
    return kept, removed


def _of_safetensors(kept: Mapping[str, torch.Tensor], removed: Mapping[str, str]) -> int:
    header: dict[str, Any] = {"__metadata__": dict(removed)} if removed else {}
    end = 0
    for name, each in sorted(kept.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + each.nbytes
        header[name] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return _LENGTH_BYTES + -(-length // _LENGTH_BYTES) * _LENGTH_BYTES + end
