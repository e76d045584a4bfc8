"""The tokens of a sequence shared among ranks, and attention over all of them.

B, T, V: batch, tokens, vocabulary; N: ranks; t = T/N tokens of a rank; a, d: heads and their size.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


class SequenceParts:
    """One way to share the tokens of a sequence.

    Attributes:
        positions: (t,) those of this rank's tokens in the sequence that was opened last.
        calls: how often attention was computed.
    """

    multiple: ClassVar[int] = 1
    """T is a multiple of this times N."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.positions: torch.Tensor | None = None
        self.calls = 0

    def open(self, ids: torch.Tensor) -> torch.Tensor:
        """Return this rank's token ids (B, t) of a sequence (B, T), and set ``positions``."""
        raise NotImplementedError

    def close(self) -> None:
        """End what ``open`` began, once forward and backward pass are through."""

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        """Compute causal attention, as transformers' attention functions do.

        Args:
            query: (B, a, t, d); ``key`` and ``value`` may have fewer heads.
            mask: transformers makes none for attention functions that it does not know.

        Returns:
            (B, t, a, d), and no weights.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self.calls += 1
        attended: torch.Tensor = sdpa_attention_forward(module, query, key, value, None, **named)[0]
        return attended, None

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Return (B, T, …) from this rank's tokens (B, t, …) and the others'. No gradient passes."""
        import torch
        from torch import distributed

        group, count = self.mesh.get_group(), self.mesh.size()
        assert self.positions is not None
        parts = part.new_empty(count * len(part), *part.shape[1:])
        distributed.all_gather_into_tensor(parts, part.detach().contiguous(), group=group)
        positions = self.positions.new_empty(count * len(self.positions))
        distributed.all_gather_into_tensor(positions, self.positions, group=group)
        by_rank = torch.cat(parts.view(count, *part.shape).unbind(), dim=1)
        return by_rank[:, positions.argsort()]


class Ulysses(SequenceParts):
    """Neighbouring tokens on each rank; around attention, all tokens of some heads.

    Two exchanges of B·t·a·d numbers each for queries, keys, values and what was attended (all-to-all).

    Source: Jacobs et al., 2023, DeepSpeed Ulysses, arXiv:2309.14509.
    """

    def open(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        count, place = self.mesh.size(), self.mesh.get_local_rank()
        size = ids.shape[1] // count
        self.positions = torch.arange(place * size, (place + 1) * size, device=ids.device)
        return ids[:, place * size : (place + 1) * size]

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (self._all_tokens(each) for each in (query, key, value))
        attended, _ = super().attend(module, query, key, value, mask, **named)
        return self._all_heads(attended), None

    def _all_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, a, t, d) to (B, a/N, T, d)."""
        batch, heads, tokens, size = x.shape
        count = self.mesh.size()
        sent = x.view(batch, count, heads // count, tokens, size).transpose(0, 1)
        return self._exchanged(sent).permute(1, 2, 0, 3, 4).reshape(batch, heads // count, count * tokens, size)

    def _all_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, a/N, d) to (B, t, a, d)."""
        batch, tokens, heads, size = x.shape
        count = self.mesh.size()
        sent = x.view(batch, count, tokens // count, heads, size).transpose(0, 1)
        return self._exchanged(sent).permute(1, 2, 0, 3, 4).reshape(batch, tokens // count, count * heads, size)

    def _exchanged(self, sent: torch.Tensor) -> torch.Tensor:
        """Return (N, …) of which each entry came from another rank; gradients go the way back."""
        from torch.distributed.nn.functional import all_to_all_single

        given = sent.contiguous()
        received: torch.Tensor = all_to_all_single(given.new_empty(given.shape), given, group=self.mesh.get_group())
        return received


class Ring(SequenceParts):
    """Torch's ring attention: keys and values pass from rank to rank; on GPUs.

    A rank has a part from the front of the sequence and one from its end, so that all have as much to attend to.

    Source: torch.distributed.tensor.experimental.context_parallel, a prototype; Liu et al., 2023, Ring Attention,
    arXiv:2310.01889.
    """

    multiple: ClassVar[int] = 2

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self._context = contextlib.ExitStack()

    def open(self, ids: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.distributed.tensor.experimental import context_parallel

        self.close()
        own, positions = ids.clone(), torch.arange(ids.shape[1], device=ids.device)
        kept = {own, positions}
        self._context.enter_context(
            context_parallel(self.mesh, buffers=[own, positions], buffer_seq_dims=[1, 0], no_restore_buffers=kept)
        )
        self.positions = positions
        return own

    def close(self) -> None:
        self._context.close()
