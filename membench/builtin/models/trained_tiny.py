"""A small byte-level Llama, trained once on the text that every CPython carries, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from membench.builtin.models.muon import Muon
from membench.builtin.models.transformer import Llama
from membench.data import corpus
from membench.host.cache import cache_folder
from membench.plugins import Context, Model, Shape, logits_of

if TYPE_CHECKING:
    from torch import nn

STEPS = 1200
PIECE_BYTES = 256
"""How much of the text it reads at a time when it is trained: with more before it than that, it does worse."""

_SHAPE = Shape(width=64, layers=2, heads=4, key_value_heads=4, inner_width=192, vocabulary=256, longest=1024, tied=True)
_RECIPE: dict[str, Any] = {
    "shape": _SHAPE,
    "steps": STEPS,
    "batch": 4,
    "length": PIECE_BYTES,
    "muon": {"rate": 0.01, "momentum": 0.95, "decay": 0.1},
    "adamw": {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.0},
    "schedule": "constant for half of the steps, then linear to zero",
    "seed": 0,
    "version": 1,  # to be raised with any other change to how it is trained
}  # fmt: skip


class TrainedTiny(Model):
    """A byte-level Llama of 0.1 million parameters, really trained, so that quality means something."""

    imports = ("torch", "transformers.models.llama.modeling_llama")
    quality = True

    @property
    def shape(self) -> Shape:
        return _SHAPE

    def miniature(self) -> Model:
        return Llama.of_shape(_SHAPE._replace(layers=1, heads=2, key_value_heads=2))

    def skeleton(self) -> nn.Module:
        import torch

        with torch.device("meta"):
            return untrained()

    def path(self) -> Path:
        """The weights' file, named by a hash of the recipe and of the text."""
        named = json.dumps([_RECIPE, corpus.digest()], sort_keys=True)
        return cache_folder() / f"trained-tiny-{hashlib.sha256(named.encode()).hexdigest()[:16]}.safetensors"

    def prepare(self, progress: Callable[[int, int, str], None]) -> None:
        import filelock
        import safetensors.torch
        import torch

        path = self.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock spares a second run the work; the rename alone keeps readers safe.
        with filelock.FileLock(f"{path}.lock"):
            if _is_whole(path):
                return
            # On one thread and by steps, every run of it on a kind of processor gives the same weights; another kind
            # may differ by a hundredth of a bit per byte.
            torch.set_num_threads(1)
            module = trained(corpus.split()[0], _RECIPE["steps"], _RECIPE["seed"], progress)
            handle, partial = tempfile.mkstemp(dir=path.parent)
            os.close(handle)
            safetensors.torch.save_model(module, partial)
            os.replace(partial, path)

    def build(self, context: Context) -> nn.Module:
        import safetensors.torch

        module = untrained()
        safetensors.torch.load_model(module, str(self.path()))
        return module.to(context.device)


class UntrainedTiny(Model):
    """trained-tiny's shape with random weights: what training it on some data brings can be seen in its quality."""

    imports = TrainedTiny.imports
    quality = True
    seed: int = Field(0, ge=0, le=2**31)
    """Added to the suite's own, for the weights and for what ``subset`` and ``lm-generated`` leave to chance."""

    @property
    def shape(self) -> Shape:
        return _SHAPE

    def miniature(self) -> Model:
        return TrainedTiny().miniature()

    def skeleton(self) -> nn.Module:
        return TrainedTiny().skeleton()

    def build(self, context: Context) -> nn.Module:
        import torch

        torch.manual_seed(seed_of(context))
        return untrained().to(context.device)


def seed_of(context: Context) -> int:
    """The suite's seed and the model's own together."""
    return context.seed + (context.model.seed if isinstance(context.model, UntrainedTiny) else 0)


def _is_whole(path: Path) -> bool:
    """Whether the file is there and can be read; one that something has cut off is trained anew."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), "pt"):
            return True
    except (FileNotFoundError, safetensors.SafetensorError):
        return False


def untrained() -> nn.Module:
    """The model with random weights, drawn from torch's generator."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(Llama.of_shape(_SHAPE).config())


def trained(text: bytes, steps: int, seed: int, progress: Callable[[int, int, str], None]) -> nn.Module:
    """The model trained on a text of more than ``PIECE_BYTES``: a piece of it from anywhere in each row.

    Muon for the matrices, AdamW for the rest, the last half of the steps with a falling rate.
    """
    import torch

    torch.manual_seed(seed)
    module = untrained()
    matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in module.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, **_RECIPE["muon"])
    adamw = torch.optim.AdamW(rest, **_RECIPE["adamw"])
    ids = torch.tensor(list(text), dtype=torch.long)
    batch, length = _RECIPE["batch"], _RECIPE["length"]
    for step in range(steps):
        share = min(1.0, (steps - step) / (steps / 2))
        muon.rate = _RECIPE["muon"]["rate"] * share
        adamw.param_groups[0]["lr"] = _RECIPE["adamw"]["lr"] * share
        starts = torch.randint(0, len(ids) - length - 1, (batch,))
        rows = torch.stack([ids[start : start + length + 1] for start in starts.tolist()])
        logits = logits_of(module(rows[:, :-1]), rows[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        muon.step()
        adamw.step()
        adamw.zero_grad()
        if step % 20 == 0:
            progress(step, steps, "training trained-tiny")
    progress(steps, steps, "training trained-tiny")
    return module
