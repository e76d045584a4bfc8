"""A generator of text kept instead of the text."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.builtin.models.trained_tiny import PIECE_BYTES, STEPS, TrainedTiny, seed_of, trained, untrained
from membench.builtin.techniques.data import DataTechnique
from membench.builtin.workloads.generate import name_of_cache
from membench.builtin.workloads.reading import Size
from membench.data import sources
from membench.plugins import Context, Unsuitable, last_logits_of

if TYPE_CHECKING:
    from torch import nn

_STREAMS = 128
_REHEARSED_BYTES = 1024
_AFTER_PARAGRAPHS, _PARAGRAPH = b"\n\n", re.compile(rb".*?\n\n|.+", re.DOTALL)
_AFTER_DOCUMENTS, _DOCUMENT = b"\0", re.compile(rb"[^\0]+")
_SMALLEST_SCALE = 2.0**-24  # of float16


class LmGenerated(DataTechnique):
    """A small byte-level language model kept instead of the text, and training fed with what it generates.

    It distils, it does not compress. The generator, trained-tiny's shape with 8-bit weights and a float16 scale a row,
    w ≈ scale · q, takes some 130 kB; under xz ``topics`` takes less, and comes back itself. A random ``subset`` of as
    many bytes teaches a model more on most seeds: hold it against that (suites/less-data.toml). What it is for is text
    that may not be kept or handed on, or that there is too little of.

    Text is sampled byte by byte, p ∝ exp(logit / temperature), in 128 streams at once with a key-value cache; a stream
    goes on from its last 128 bytes when it has reached the 256 that the generator has learnt to read. The bytes of the
    data are those of the generator's file. Phase ``store`` has the training in it, unless the text is ``topics`` and
    ``steps`` is not given: then weights are trained-tiny's own.

    Attributes:
        generated_size: how much text, such as '256 KiB'.
        temperature: below 1, what is likely is made likelier.
        steps: of training the generator; 1,200 where it is trained at all.
    """

    imports: ClassVar[tuple[str, ...]] = TrainedTiny.imports
    generated_size: Size = 2**18
    temperature: float = Field(1.0, ge=0.01, le=100)
    steps: int | None = Field(None, ge=1)

    def prepare(self, make: object, context: Context) -> None:
        # What members before it make of a text is known later; of ``topics`` they make at most less.
        wanted = context.corpus
        if wanted is None or context.rehearsal:
            return
        if self._keeps_trained_tiny(sources.documents(wanted.source, wanted.most_bytes)):
            TrainedTiny().prepare(lambda done, total, what: None)

    def _keeps_trained_tiny(self, documents: Sequence[bytes]) -> bool:
        return self.steps is None and documents == sources.documents("topics", None)

    def corpus(self, documents: Sequence[bytes], context: Context) -> Sequence[bytes]:
        path = context.scratch / "generator.safetensors"
        seed = seed_of(context)
        began = time.perf_counter()
        if self._keeps_trained_tiny(documents):
            end, pattern, trained_how = _AFTER_PARAGRAPHS, _PARAGRAPH, "with trained-tiny's own weights"
            keep(TrainedTiny().build(context), path)
        else:
            end, pattern, steps = _AFTER_DOCUMENTS, _DOCUMENT, 1 if context.rehearsal else self.steps or STEPS
            keep(self._trained(documents, steps, seed), path)
            trained_how = f"trained for {steps:,} steps in {time.perf_counter() - began:.1f} s"
        size = _REHEARSED_BYTES if context.rehearsal else self.generated_size
        began = time.perf_counter()
        text = generated(kept(path).to(context.device), end, size, self.temperature, seed, context.device)
        took_s = time.perf_counter() - began
        context.facts["corpus_kept_percent"] = (0.0, "none of the text: all that is trained on is generated")
        context.facts["data_bytes"] = (
            path.stat().st_size,
            f"size of the generator's file, {trained_how}; it generated {size:,} bytes in {took_s:.1f} s",
        )
        return documents if context.rehearsal else [found for stream in text for found in pattern.findall(stream)]

    def _trained(self, documents: Sequence[bytes], steps: int, seed: int) -> nn.Module:
        import torch

        text = b"".join(document + _AFTER_DOCUMENTS for document in documents)
        if len(text) < 2 * PIECE_BYTES:
            raise Unsuitable(f"a generator needs {2 * PIECE_BYTES} bytes to learn from, and the data have {len(text)}")
        with torch.random.fork_rng([]):  # what the case draws later must not depend on it
            return trained(text, steps, seed, lambda done, total, what: None)


def keep(module: nn.Module, path: Path) -> None:
    """Write a module's matrices as 8-bit integers with a float16 scale a row, and the rest as float16."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in module.named_parameters():  # tied ones come once
        weights = parameter.detach().float().cpu()
        if weights.ndim < 2:
            tensors[name] = weights.half()
            continue
        scale = (weights.abs().amax(1, keepdim=True) / 127).clamp(min=_SMALLEST_SCALE).half()
        tensors[name] = (weights / scale.float()).round().clamp(-127, 127).to(torch.int8)
        tensors[f"{name}.scale"] = scale
    save_file(tensors, path)


def kept(path: Path) -> nn.Module:
    """trained-tiny's shape with the weights of such a file, in fp32."""
    import torch
    from safetensors.torch import load_file

    tensors, module = load_file(path), untrained()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = tensors.get(f"{name}.scale")
            weights = tensors[name].float()
            parameter.copy_(weights if scale is None else weights * scale.float())
    return module.eval()


def generated(module: Any, before: bytes, size: int, temperature: float, seed: int, device: str) -> Sequence[bytes]:
    """Runs of text that a model of bytes generates, so many bytes in all.

    Args:
        before: what each run follows: the end of a document in the text that the model has learnt.
    """
    import torch
    from transformers import StaticCache

    streams = max(1, min(_STREAMS, size // PIECE_BYTES))
    wanted, cache_name = -(-size // streams), name_of_cache(module)
    random = torch.Generator(device).manual_seed(seed)
    text = torch.tensor(list(before), device=device).repeat(streams, 1)
    with torch.no_grad():
        while (more := len(before) + wanted - text.shape[1]) > 0:
            seen = text[:, -PIECE_BYTES // 2 :]
            options = {"use_cache": True, cache_name: StaticCache(config=module.config, max_cache_len=PIECE_BYTES)}
            # The fused kernel for many bytes at a time saves memory; for one at a time it takes twice as long.
            module.set_attn_implementation("sdpa")
            logits, new = last_logits_of(module(seen, **options), seen)[:, 0], []
            module.set_attn_implementation("eager")
            for left in reversed(range(min(more, PIECE_BYTES - seen.shape[1]))):
                new.append(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random))
                if left:
                    logits = last_logits_of(module(new[-1], **options), new[-1])[:, 0]
            text = torch.cat([text, *new], 1)
    rows = text[:, len(before) :].to(torch.uint8).cpu().numpy()
    whole = [row.tobytes() for row in rows]
    whole[-1] = whole[-1][: size - wanted * (streams - 1)]
    return whole
