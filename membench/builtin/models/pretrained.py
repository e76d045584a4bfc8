"""Models that somebody trained: a local folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn


class Pretrained(Model):
    """A causal language model from a folder or a hub id, safetensors only."""

    imports = ("torch", "transformers.models.auto.modeling_auto")
    source: str
    trust_remote_code: bool = False

    def build(self, context: Context) -> nn.Module:
        import torch
        from transformers import AutoModelForCausalLM

        try:
            module = AutoModelForCausalLM.from_pretrained(
                self.source, dtype=torch.float32, use_safetensors=True, trust_remote_code=self.trust_remote_code
            )
        except OSError as error:
            if Path(self.source).exists():
                raise
            raise RuntimeError(f"'{self.source}' is no local folder and cannot be had from the hub: {error}") from error
        return module.to(context.device)
