"""AdamW for weights in half precision, with a copy of them in fp32."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@functools.cache
def adamw_with_master_weights() -> type[torch.optim.Optimizer]:
    """The optimizer's class; made here because torch must not be imported when the module is."""
    import torch
    from torch.optim.adamw import adamw

    class AdamWWithMasterWeights(torch.optim.Optimizer):
        """AdamW that keeps an fp32 copy of each weight, updates the copy and rounds it into the weight.

        Copy and moments are made at the first step. Weights are worked through one by one, so that only one gradient
        at a time is there in fp32.
        """

        def __init__(
            self,
            params: Any,
            lr: float,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 1e-2,
        ) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert closure is None
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._update(weight, group)

        def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
            assert weight.grad is not None
            state = self.state[weight]
            if not state:
                master = weight.detach().to(torch.float32, copy=True)
                state |= {"master": master, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master),
                          "step": torch.zeros(())}  # fmt: skip
            beta1, beta2 = group["betas"]
            adamw(
                [state["master"]], [weight.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [],
                [state["step"]], foreach=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            weight.copy_(state["master"])

    return AdamWWithMasterWeights
