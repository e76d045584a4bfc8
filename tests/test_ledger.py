"""The live bytes of fake tensors, against what the same operations hold for real."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from membench.worker.tracing.ledger import Ledger

_MIB = 2**20
_SCALARS_BYTES = 1024


def test_gradients_of_two_uses_are_added_in_place_as_in_training_for_real() -> None:
    """Weights, what is computed of them, and a gradient of each use are alive at once; their sum is one of the two."""
    fake = FakeTensorMode()
    with fake, Ledger(fake, lambda size: size) as ledger:
        weights = torch.zeros(_MIB // 4, requires_grad=True)
        used_twice = weights * 2
        loss = (used_twice * 3).sum() + (used_twice * 5).sum()
        with ledger.span() as backward:
            loss.backward()  # type: ignore[no-untyped-call]
    assert 4 * _MIB <= backward.whole.bytes <= 4 * _MIB + _SCALARS_BYTES


def test_pages_of_a_file_are_not_live_but_what_is_computed_of_them_is() -> None:
    fake = FakeTensorMode()
    with fake, Ledger(fake, lambda size: size) as ledger:
        mapped = torch.zeros(_MIB // 4)
        ledger.leave_out([mapped])
        assert ledger.live_bytes == 0
        computed = mapped.view(2, -1) * 2
        assert ledger.live_bytes == _MIB
        del computed, mapped
        assert ledger.live_bytes == 0
        again = torch.zeros(_MIB // 4)  # it may have the storage's address
        assert ledger.live_bytes == _MIB
        del again
