"""Parts of weights that DistributedDataParallel can average: it takes plain tensors alone.

Torch's own transformation for DDP over tensor parallelism (``_pre_dp_module_transform``) takes the weights out of the
module's parameters at its first forward pass; here they stay there, under another name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_SUFFIX = "_shard"


def make_shards_plain(module: nn.Module) -> None:
    """Let this rank's parts of weights be parameters, where the weights themselves are spread over ranks.

    A layer computes with the weight as before, which is now made of the part: gradients arrive there. A state dict has
    the weights, under their names.
    """
    from torch import nn
    from torch.distributed.tensor import DTensor

    made: dict[int, tuple[nn.Parameter, Any]] = {}
    spread: dict[str, Any] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        for name, weight in list(layer._parameters.items()):
            if not isinstance(weight, DTensor):
                continue
            if id(weight) not in made:
                local: Any = weight.detach()
                part = nn.Parameter(local.to_local(), requires_grad=weight.requires_grad)
                made[id(weight)] = part, _of_part(part, weight)
            part, whole = made[id(weight)]
            del layer._parameters[name]
            setattr(layer, name, whole)
            layer.register_parameter(f"{name}{_SUFFIX}", part)
            spread[".".join(filter(None, (path, name)))] = whole

    def restore(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for key in list(state):
            whole = spread.get(key.removeprefix(prefix).removesuffix(_SUFFIX))
            value = state.pop(key)
            state[key if whole is None else key.removesuffix(_SUFFIX)] = value if whole is None else whole.detach()

    if spread:
        module.register_state_dict_post_hook(restore)


def _of_part(part: Any, weight: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
