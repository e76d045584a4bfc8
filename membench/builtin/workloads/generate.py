"""Prefill and decode with a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from membench.plugins import Context, Step, Technique, Workload

if TYPE_CHECKING:
    import torch
    from torch import nn


class Generate(Workload):
    """Greedy generation with a key-value cache: parts prefill (time to first token) and decode."""

    batch_size: int = Field(1, ge=1)
    prompt_length: int = Field(128, ge=1)
    new_tokens: int = Field(32, ge=2)

    def longest_sequence(self) -> int:
        return self.prompt_length + self.new_tokens

    def tokens_per_step(self) -> int:
        return self.batch_size * self.new_tokens

    def tokens_read(self) -> int:
        return self.batch_size * self.prompt_length

    def decoded_tokens_per_step(self) -> int | None:
        return self.batch_size * (self.new_tokens - 1)  # the first comes out of the prefill

    def start(self, module: nn.Module, tokens: torch.Tensor, techniques: list[Technique], context: Context) -> Step:
        import torch

        prompt = tokens.view(self.batch_size, self.prompt_length).to(context.device)
        options: dict[str, Any] = {"use_cache": True}
        for technique in techniques:
            options = technique.generate_options(options, context)

        def step() -> None:
            with torch.no_grad():
                with context.part("prefill"):
                    output = module(prompt, **options)
                    token = output.logits[:, -1:].argmax(-1)
                    cache = output.past_key_values
                    del output
                with context.part("decode"):
                    for _ in range(self.new_tokens - 1):
                        decoded = module(token, **{**options, "past_key_values": cache})
                        token, cache = decoded.logits[:, -1:].argmax(-1), decoded.past_key_values

        return step
