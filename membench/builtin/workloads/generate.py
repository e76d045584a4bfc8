"""Prefill and decode with a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from membench.plugins import Context, Step, Technique, Tokens, Unsuitable, Workload, given_back, stepping

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOKENS_AT_ONCE = 32


class Generate(Workload):
    """Greedy generation with a key-value cache: parts prefill (time to first token) and decode."""

    batch_size: int = Field(1, ge=1, le=65_536)
    prompt_length: int = Field(128, ge=1, le=1_048_576)
    new_tokens: int = Field(32, ge=2, le=1_048_576)

    def longest_sequence(self) -> int:
        return self.prompt_length + self.new_tokens

    def tokens_per_step(self) -> int:
        return self.batch_size * self.new_tokens

    def decoded_tokens_per_step(self) -> int | None:
        return self.batch_size * (self.new_tokens - 1)  # the first comes out of the prefill

    def cached_tokens(self) -> int | None:
        return self.batch_size * (self.longest_sequence() - 1)  # nobody reads what follows the last

    def logits(
        self, module: nn.Module, ids: torch.Tensor, techniques: Sequence[Technique], context: Context
    ) -> torch.Tensor:
        """As while generating, so that what a technique's cache loses shows: some tokens at a time, through the cache.

        Where no technique touches the cache, one pass over all tokens gives the same.
        """
        import torch

        if all(type(technique).generate_options is Technique.generate_options for technique in techniques):
            return super().logits(module, ids, techniques, context)
        name = name_of_cache(module)
        options = _options(techniques, context, name)
        read = []
        for some in ids.split(_TOKENS_AT_ONCE):
            output = module(some[None], **options)
            options[name] = getattr(output, name)
            read.append(output.logits[0])
        return torch.cat(read)

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        name = name_of_cache(module)
        prompt = tokens(self.batch_size * self.prompt_length).view(self.batch_size, self.prompt_length)
        prompt = prompt.to(context.device)
        cache: list[Any] = []
        context.inventory["cache"] = lambda: cache

        def step() -> None:
            with torch.no_grad(), stepping(techniques, context):
                options = _options(techniques, context, name)
                with context.part("prefill"):
                    output = module(prompt, **options)
                    token = output.logits[:, -1:].argmax(-1)
                    cache[:] = [getattr(output, name)]
                    del output
                with context.part("decode"):
                    for _ in range(self.new_tokens - 1):
                        decoded = module(token, **{**options, name: cache[0]})
                        token = decoded.logits[:, -1:].argmax(-1)
                        cache[:] = [getattr(decoded, name)]
                    del decoded
                options.clear()
                cache.clear()

        return step


def name_of_cache(module: nn.Module) -> str:
    """What the module's forward pass calls its key-value cache; transformers renamed it in 5.24.

    Raises:
        Unsuitable: if it takes none.
    """
    taken = inspect.signature(module.forward).parameters
    if "cache" in taken:
        return "cache"
    if "past_key_values" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise Unsuitable("generating wants a module with a key-value cache: its forward takes no past_key_values")
    return "past_key_values"


def _options(techniques: Sequence[Technique], context: Context, name: str) -> dict[str, Any]:
    """What the module's forward pass is given, its cache under its own name for it.

    To be asked for anew: a technique's cache serves one generation.
    """
    options: dict[str, Any] = {"use_cache": True}
    for technique in techniques:
        options = given_back(technique.generate_options(options, context), technique, "generate_options", "options")
    if "past_key_values" in options:
        options[name] = options.pop("past_key_values")
    return options
