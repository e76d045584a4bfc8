"""Single weights set to zero, and whether that saves anything."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from membench.builtin.techniques.experts import remark_on_left
from membench.builtin.techniques.pruning import Pruning, is_linear, is_transposed, plain_weight
from membench.builtin.techniques.quantizer import as_linear
from membench.host.device import Device
from membench.plugins import Context, SelectsLayers, Setting, Unsuitable, output_head, replaced
from membench.plugins.replacing import (
    LeftAlone,
    WeightUse,
    is_plain_subclass,
    reason_not_to_convert,
    reason_to_keep,
    use_of,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

_PIECE = 2**20
_NO_HALF = "on a CPU no kernel multiplies sparse matrices of half precision"


class _Unstructured(Pruning, SelectsLayers):
    """Sets single weights of the linear layers to zero; the output head is left alone."""

    acts_on: ClassVar[str] = "weights"

    def masks(self, module: nn.Module, names: Sequence[str], context: Context) -> Iterator[torch.Tensor]:
        """A mask for the weight of each named layer, in order, True where it stays. Each is taken, then put to use.

        Raises:
            Unsuitable: if every weight would stay, or none. A rehearsal's miniature may be that small.
        """
        raise NotImplementedError

    def prunes(self, layer: nn.Module) -> bool:
        """Whether a linear layer is pruned at all."""
        return True

    def keeps_masks(self) -> bool:
        """Whether the weights stay under ``torch.nn.utils.prune``'s masks."""
        return False

    def stored(self, layer: nn.Module) -> nn.Module:
        """What takes the place of a layer whose weight has its zeros."""
        return layer

    def remark(self, module: nn.Module, context: Context) -> str | None:
        return remark_on_left(module)

    def loses(self, layer: nn.Module, use: WeightUse | None) -> str | None:
        """Why a layer would lose something of its own if it were pruned; ``None`` if it would not.

        Dense zeros change nothing but numbers. A mask is applied when the layer's forward is called.
        """
        return f"its weight is read by {use.computed_by}" if use and use.computed_by and self._masks_a_while else None

    @property
    def _masks_a_while(self) -> bool:
        return self.keeps_masks() or self.recover_steps > 0

    def _names(self, module: nn.Module, context: Context) -> list[str]:
        """The paths of the layers that are pruned.

        Raises:
            Unsuitable: if there are none.
        """
        head = output_head(module)
        linear = {name: layer for name, layer in module.named_modules() if is_linear(layer)}
        self.check_patterns(linear, context)
        names = []
        for name, layer in linear.items():
            if layer is head or not self.selects(name):
                continue
            reason = reason_not_to_convert(layer) or self.loses(layer, use_of(name, context.weight_uses))
            if reason is not None:
                context.left_alone.append(LeftAlone(self, name, reason))
            elif self.prunes(layer):
                names.append(name)
        if not names:
            raise Unsuitable(_nothing_to_prune(module, [left for left in context.left_alone if left.technique is self]))
        return names

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch
        from torch.nn.utils import prune

        names, masked = self._names(module, context), self._masks_a_while
        with torch.no_grad():
            for name, mask in zip(names, self.masks(module, names, context), strict=True):
                layer = module.get_submodule(name)
                if masked:
                    prune.custom_from_mask(layer, "weight", mask.to(plain_weight(layer).dtype))
                else:
                    plain_weight(layer).masked_fill_(~mask, 0)
                    module = replaced(module, name, self.stored(layer))
            if not self.recover_steps:
                return module
        self.recover(module, context)
        with torch.no_grad():
            for name in names:
                layer = module.get_submodule(name)
                if self.keeps_masks():
                    _refresh(layer)
                else:
                    module = replaced(module, name, self.stored(prune.remove(layer, "weight")))
        return module


class MagnitudePrune(_Unstructured):
    """Sets the model's smallest linear weights to zero, kept under masks, as dense zeros or as sparse matrices.

    Global and unstructured: of the n weights of all linear layers, the round(sparsity·n) of least magnitude become
    zero. ``torch.nn.utils.prune.global_unstructured`` with ``L1Unstructured`` takes as many, and the same ones but
    where magnitudes at the threshold are equal. It puts all weights in one vector and sorts that, which peaked at
    twelve times their bytes; here the threshold is found by counting, piece by piece, and masks are made one layer at
    a time. Embeddings and the output head are left alone.

    - ``storage = "mask"`` is what ``torch.nn.utils.prune`` leaves: the original, the mask as a buffer, the masked
      weight, and the mask once more in the hook: 16 bytes for each weight of 4.
    - ``"dense"`` removes the masks; a zero takes as much as any number.
    - ``"csr"`` multiplies sparse matrices: 8 bytes for each weight that is left (fp32 and int32 column) and 4 for each
      row. That is less than dense fp32 from 50% zeros on, less than dense bf16 from 75%. On a CPU it was as fast as
      dense from 80% (prefill) or 90% (decode).

    ``recover_steps`` trains under the masks, so that zeros stay zeros; masks and optimizer states then make the peak.
    """

    imports = ("torch", "membench.builtin.layers.sparse")
    sparsity: float = Field(0.5, gt=0, lt=1)
    storage: Literal["mask", "dense", "csr"] = "mask"

    def refuse(self, setting: Setting) -> str | None:
        stack = (*setting.before, *setting.after)
        after = [bits for technique in setting.after if (bits := technique.nominal_bits()) is not None]
        if setting.workload.trains and self.storage == "dense":
            return "training would fill dense zeros again: take storage = 'mask'"
        if setting.workload.trains and self.storage == "csr":
            return "sparse weights are multiplied here, not trained: take storage = 'mask'"
        if self.storage != "dense" and any(bits < 16 for bits in after):
            return f"a quantizer takes dense weights, not those of storage = '{self.storage}': take storage = 'dense'"
        if self.storage == "csr" and setting.device == "cpu" and any(t.nominal_bits() == 16 for t in stack):
            return _NO_HALF
        return super().refuse(setting)

    def nominal_share(self) -> float | None:
        return 1 - self.sparsity

    def masks(self, module: nn.Module, names: Sequence[str], context: Context) -> Iterator[torch.Tensor]:
        def weights() -> Iterator[torch.Tensor]:
            return (plain_weight(module.get_submodule(name)) for name in names)

        whole = sum(weight.numel() for weight in weights())
        count = round(self.sparsity * whole)
        if not 0 < count < whole and not context.rehearsal:
            raise Unsuitable(f"sparsity = {self.sparsity:g} prunes {'all' if count else 'none'} of {whole:,} weights")
        threshold, smaller = _smallest(weights, count)
        ties = count - smaller
        for weight in weights():
            sizes = _sizes(weight)
            mask, equal = sizes > threshold, (sizes == threshold).flatten()
            found = int(equal.sum())
            if found > ties:  # only as many of those at the threshold go as are still wanted: the first ones
                mask |= (equal & (equal.cumsum(0) > ties)).view_as(mask)
            ties = max(0, ties - found)
            del sizes, equal, weight
            yield mask

    def keeps_masks(self) -> bool:
        return self.storage == "mask"

    def stored(self, layer: nn.Module) -> nn.Module:
        return _as_sparse(layer) if self.storage == "csr" else layer

    def loses(self, layer: nn.Module, use: WeightUse | None) -> str | None:
        return reason_to_keep(layer, use) if self.storage == "csr" else super().loses(layer, use)


class SemiStructured(_Unstructured):
    """Keeps the 2 largest of every 4 weights of a row and packs them for the 2:4 kernels of NVIDIA GPUs.

    9/16 of the bytes of 16-bit weights: two values of four, and 2 bits for the place of each. Kept by
    ``torch.sparse.to_sparse_semi_structured`` (Mishra et al., 2021, arXiv:2104.08378).

    Limits: CUDA of capability 8.0 or more, cuSPARSELt, 16-bit weights (stack it after ``bf16`` or ``fp16``). A layer
    with a side that 16 does not divide stays whole, and so do embeddings and the output head. It is not trained
    afterwards; ``recover_steps`` train under masks, before the weights are packed.
    """

    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def refuse(self, setting: Setting) -> str | None:
        if not Device.parse(setting.device).on_gpu:
            return "2:4 sparse kernels need a CUDA device of capability 8.0 or more; a CPU has none"
        if setting.workload.trains:
            return "2:4 sparse weights are multiplied here, not trained"
        if any(technique.nominal_bits() is not None for technique in setting.after):
            return "2:4 sparse weights cannot be converted further: let it come last"
        return super().refuse(setting)

    def nominal_share(self) -> float | None:
        return 0.5

    def prunes(self, layer: nn.Module) -> bool:
        return all(size % 16 == 0 for size in plain_weight(layer).shape)

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch

        capability = torch.cuda.get_device_capability(context.device)
        if capability < (8, 0):
            raise Unsuitable(
                f"2:4 sparse kernels need capability 8.0 or more; this GPU has {capability[0]}.{capability[1]}"
            )
        if not torch.backends.cusparselt.is_available():
            raise Unsuitable("this build of torch has no cuSPARSELt, which multiplies 2:4 sparse matrices")
        return super().apply(module, context)

    def masks(self, module: nn.Module, names: Sequence[str], context: Context) -> Iterator[torch.Tensor]:
        for name in names:
            layer = module.get_submodule(name)
            weight = plain_weight(layer)
            if weight.element_size() != 2:
                raise Unsuitable("2:4 sparse kernels take 16-bit weights: stack this after bf16 or fp16")
            yield largest_two_of_four(weight, 0 if is_transposed(layer) else 1)

    def loses(self, layer: nn.Module, use: WeightUse | None) -> str | None:
        return reason_to_keep(layer, use, weight_only=not (is_transposed(layer) or is_plain_subclass(layer)))

    def stored(self, layer: nn.Module) -> nn.Module:
        import torch

        linear: Any = as_linear(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an interface that is a prototype
            packed = torch.sparse.to_sparse_semi_structured(linear.weight.data)
        linear.weight = torch.nn.Parameter(packed, requires_grad=False)
        return linear


def _nothing_to_prune(module: nn.Module, left: Sequence[LeftAlone]) -> str:
    kept = f": '{left[0].path}' is left alone, {left[0].reason}" if left else ""
    return f"a {type(module).__name__} has no linear layers that could be pruned{kept}"


def largest_two_of_four(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """A mask, True at the two largest magnitudes of every four neighbours along an axis."""
    import torch

    fours = weight.detach().movedim(axis, -1).abs().unflatten(-1, (-1, 4))
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2).indices, True)
    return mask.flatten(-2).movedim(-1, axis)


def _sizes(weight: torch.Tensor) -> torch.Tensor:
    """Magnitudes as integers in the same order: the bits of their fp32 form, int32."""
    import torch

    return weight.detach().abs().float().view(torch.int32)


def _smallest(weights: Callable[[], Iterable[torch.Tensor]], count: int) -> tuple[int, int]:
    """The ``count``-th smallest size, and how many are smaller.

    Counted twice in pieces of a million: by the upper 15 of the 31 bits, then, where those of the one looked for are
    known, by the lower 16.
    """
    import torch

    def counted(upper: int | None) -> torch.Tensor:
        found = torch.zeros(2**15 if upper is None else 2**16, dtype=torch.long)
        for weight in weights():
            for piece in weight.detach().flatten().split(_PIECE):
                sizes = _sizes(piece)
                chosen = sizes >> 16 if upper is None else sizes[sizes >> 16 == upper] & 0xFFFF
                found += torch.bincount(chosen, minlength=len(found)).cpu()
        return found.cumsum(0)

    below = counted(None)
    upper = int(torch.searchsorted(below, count))
    fewer = int(below[upper - 1]) if upper else 0
    below = counted(upper)
    lower = int(torch.searchsorted(below, count - fewer))
    return upper << 16 | lower, fewer + (int(below[lower - 1]) if lower else 0)


def _refresh(layer: nn.Module) -> None:
    """Make the masked weight of the original as it is now: training changed it after the mask was last applied."""
    from torch.nn.utils import prune

    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(layer, None)


def _as_sparse(layer: nn.Module) -> nn.Module:
    """A linear layer that multiplies its weight as a sparse matrix (CSR, int32 indices).

    Raises:
        Unsuitable: if no kernel here does that.
    """
    import torch

    from membench.builtin.layers.sparse import SparseLinear

    linear: Any = as_linear(layer)
    weight = linear.weight.detach()
    if weight.device.type == "cpu" and not torch.backends.mkl.is_available():
        raise Unsuitable("on a CPU sparse matrices are multiplied by MKL, which this build of torch lacks")
    if weight.device.type == "cpu" and weight.element_size() < 4:
        raise Unsuitable(_NO_HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an interface that is in beta state
        sparse = weight.to_sparse_csr()
    return SparseLinear(sparse, linear.bias)
