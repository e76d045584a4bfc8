"""Keys and values of past tokens as integers and scales."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from membench.plugins import Context, Setting, Technique


class _QuantizedCache(Technique):
    imports: ClassVar[tuple[str, ...]] = ("torch", "membench.builtin.layers.quantized_cache")
    acts_on: ClassVar[str] = "cache"
    bits: ClassVar[int]
    group_size: int | None = Field(None, ge=2)
    residual_length: int = Field(0, ge=0)

    def nominal_cache_bits(self) -> float | None:
        return self.bits

    def check(self, setting: Setting) -> str | None:
        shape = setting.model.shape
        if shape is None:
            return None
        head_size = shape.width // shape.heads
        if self.group_size is not None and head_size % self.group_size:
            return f"group_size = {self.group_size} does not divide the {head_size} numbers of the model's heads"
        if self.bits == 4 and head_size % 2:
            return f"two numbers go into a byte, and the model's heads have {head_size}"
        return None

    def refuse(self, setting: Setting) -> str | None:
        if setting.workload.decoded_tokens_per_step() is None:
            return "there is a key-value cache while generating only, and this workload does not generate"
        if any(isinstance(technique, _QuantizedCache) for technique in setting.before):
            return "the key-value cache is quantized already"
        return None

    def generate_options(self, options: dict[str, Any], context: Context) -> dict[str, Any]:
        from membench.builtin.layers.quantized_cache import quantized_cache

        group_size = None if context.rehearsal else self.group_size  # a miniature's heads are of another size
        return {**options, "past_key_values": quantized_cache(self.bits, group_size, self.residual_length)}


class KvCacheInt8(_QuantizedCache):
    """The key-value cache as int8, with a scale for each token's head: s = max|x| / 127, q = round(x / s).

    2 · layers · key-value heads · tokens · batch · (D + 2 · D / ``group_size``) bytes for heads of D numbers, a scale
    taking two; the newest ``residual_length`` tokens take D · 4 (or 2) bytes in its place. A group is a token's whole
    head unless ``group_size`` says otherwise; with 32 it is what llama.cpp's ``-ctk q8_0 -ctv q8_0`` keeps. A token is
    rounded once, when it leaves the residual, where transformers' ``QuantizedCache`` (which has no 8 bits without hqq)
    rounds all of them again and again.

    Scales are fp16: what is above 65,504 · 127 is lost. There is no kernel that reads integers: attention gets one
    layer's keys and values unpacked at a time, so decoding takes that layer's share of an unquantized cache for a
    moment, and time. Also a prompt attends to rounded keys.
    """

    bits = 8


class KvCacheInt4(_QuantizedCache):
    """The key-value cache as 4-bit integers, with a scale and a minimum for each token's head, two in a byte.

    s = (max - min) / 15, q = round((x - min) / s): 2 · layers · key-value heads · tokens · batch · (D / 2 + 4 · D /
    ``group_size``) bytes for heads of D numbers, so heads of 128 take 4.25 bits a number and heads of 16 take 6. A
    minimum beyond fp16's 65,504 is lost. KIVI (Liu et al., 2024, arXiv:2402.02750) found that keys want a scale a
    channel below 4 bits, and keeps the newest tokens unrounded: ``residual_length``. For the rest see
    ``kv-cache-int8``.
    """

    bits = 4
