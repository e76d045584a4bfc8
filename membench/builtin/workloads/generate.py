"""Prefill and decode with a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from membench.plugins import (
    Context,
    Step,
    Technique,
    Tokens,
    Unsuitable,
    Workload,
    given_back,
    last_logits_of,
    logits_of,
    own_rows,
    stepping,
)
from membench.plugins.logits import described

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOKENS_AT_ONCE = 32


class Generate(Workload):
    """Greedy generation with a key-value cache: parts prefill (time to first token) and decode.

    The forward pass takes its cache as ``past_key_values`` (or ``cache``) and returns it under that name, or in a tuple
    after the logits. Logits of the last position alone are enough; then there is no loss of held-out text. Where there
    is an encoder, it reads the prompt in the prefill, and the decoder begins with one token.
    """

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
        options = _options(module, techniques, context, name)
        read = []
        for some in ids[None].split(_TOKENS_AT_ONCE, dim=1):
            output = module(some, **options)
            options[name] = cache_of(output, name)
            read.append(logits_of(output, some)[0])
        return torch.cat(read)

    def check_output(self, module: nn.Module, ids: torch.Tensor) -> int:
        """Run a prefill and the decoding of one token, as ``start`` does."""
        name = name_of_cache(module)
        options = _first_options(module)
        output, given = _prefilled(module, ids[:, :-1], options)
        last_logits_of(output, given)
        token = ids[:, -1:]
        decoded = _decoded(module, token, {**options, **_encoded(output), name: cache_of(output, name)})
        return last_logits_of(decoded, token).shape[-1]

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        name = name_of_cache(module)
        prompt = tokens(self.batch_size * self.prompt_length).view(self.batch_size, self.prompt_length)
        prompt = own_rows(prompt, techniques, context).to(context.device)
        cache: list[Any] = []
        context.inventory["cache"] = lambda: cache

        def step() -> None:
            with torch.no_grad(), stepping(techniques, context):
                options = _options(module, techniques, context, name)
                with context.part("prefill"):
                    output, given = _prefilled(module, prompt, options)
                    token = last_logits_of(output, given).argmax(-1)
                    cache[:] = [cache_of(output, name)]
                    hidden = _encoded(output)
                    del output
                with context.part("decode"):
                    for _ in range(self.new_tokens - 1):
                        decoded = _decoded(module, token, {**options, **hidden, name: cache[0]})
                        token = last_logits_of(decoded, token).argmax(-1)
                        cache[:] = [cache_of(decoded, name)]
                    del decoded
                options.clear()
                cache.clear()

        return step


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a module of transformers has a decoder beside an encoder."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _prefilled(module: nn.Module, prompt: torch.Tensor, options: dict[str, Any]) -> tuple[object, torch.Tensor]:
    """What a module returns for a prompt (B, T), and the ids that its logits are of.

    An encoder reads the prompt, and its decoder begins with the token that the configuration names.
    """
    import torch

    if not is_encoder_decoder(module):
        return module(prompt, **options), prompt
    start = getattr(module.config, "decoder_start_token_id", None) or 0
    first = torch.full_like(prompt[:, :1], start)
    return module(prompt, decoder_input_ids=first, **options), first


def _encoded(output: object) -> dict[str, Any]:
    """What the decoder is given of the encoder's output, if there is an encoder."""
    hidden = getattr(output, "encoder_last_hidden_state", None)
    if hidden is None:
        return {}
    from transformers.modeling_outputs import BaseModelOutput

    return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}


def _decoded(module: nn.Module, token: torch.Tensor, options: dict[str, Any]) -> object:
    """What a module returns for the next token ids (B, 1)."""
    return module(decoder_input_ids=token, **options) if "encoder_outputs" in options else module(token, **options)


def name_of_cache(module: nn.Module) -> str:
    """What the module's forward pass calls its key-value cache; transformers renamed it in 5.24.

    Raises:
        Unsuitable: if it takes none.
    """
    taken = inspect.signature(module.forward).parameters
    if "cache" in taken:
        return "cache"
    if "past_key_values" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise Unsuitable("generating needs a module with a key-value cache: its forward takes no past_key_values")
    return "past_key_values"


def cache_of(output: object, name: str) -> Any:
    """The key-value cache in what a module returned.

    Args:
        name: what its forward pass calls the cache.

    Raises:
        Unsuitable: if it returned none.
    """
    import torch

    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if found is None and isinstance(output, tuple | list):
        found = next((part for part in output if part is not None and not isinstance(part, torch.Tensor)), None)
    if found is None:
        raise Unsuitable(
            "generating needs a module with a key-value cache: its forward returned"
            f" {described(output)}, without {name}"
        )
    return found


def _first_options(module: nn.Module) -> dict[str, Any]:
    """Ask for a cache, in the words that the module's forward pass has for it."""
    taken = inspect.signature(module.forward).parameters
    is_asked = "use_cache" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return {"use_cache": True} if is_asked else {}


def _options(module: nn.Module, techniques: Sequence[Technique], context: Context, name: str) -> dict[str, Any]:
    """What the module's forward pass is given, its cache under its own name for it.

    To be asked for anew: a technique's cache serves one generation.
    """
    options = _first_options(module)
    for technique in techniques:
        options = given_back(technique.generate_options(options, context), technique, "generate_options", "options")
    if "past_key_values" in options and is_encoder_decoder(module):
        raise Unsuitable("a decoder beside an encoder has two caches, of its own tokens and of the encoder's")
    if "past_key_values" in options:
        options[name] = options.pop("past_key_values")
    return options
