"""Agreement among the ranks of a case, wherever a clock or an error of one of them would let them part.

A rank that takes another way than the others leaves them waiting in a collective until the job's time is over.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from membench.plugins import Ranks

_WAIT_S = 10.0
"""How long a rank that failed looks for the others; one that waits for it in a collective never comes through."""
_LOOK_S = 0.02


def decided_by_first(ranks: Ranks | None, decision: bool) -> bool:
    """Return the decision of the first rank, on all ranks; without ranks the own one."""
    if ranks is None:
        return decision
    import torch
    from torch import distributed

    shared = torch.tensor([int(decision)])
    distributed.broadcast(shared, 0)
    return bool(shared.item())


def on_any(ranks: Ranks | None, fact: bool) -> bool:
    """Whether something is so on any rank; all ranks must ask. It also lets them go on at the same time."""
    if ranks is None:
        return fact
    import torch
    from torch import distributed

    shared = torch.tensor([int(fact)])
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return bool(shared.item())


def come_through(ranks: Ranks | None, what: str, error: Exception | None = None) -> None:
    """Say that this rank has come through something that may fail without ending the case.

    It may go on after an error if the others come through, too, whether well or not.

    Args:
        what: names it, for all ranks alike; what is tried again has been tried as often on all.
        error: why this rank did not do all of it.

    Raises:
        Exception: the error, if another rank does not come through within some time: it waits for this one.
    """
    if ranks is None:
        return
    before = len(list(ranks.shared.glob(f"{what}-*-of-{ranks.number}")))
    said = [ranks.shared / f"{what}-{before}-of-{number}" for number in range(ranks.of)]
    said[ranks.number].touch()
    until_s = time.monotonic() + _WAIT_S
    while error is not None and not all(each.exists() for each in said):
        if time.monotonic() > until_s:
            raise error
        time.sleep(_LOOK_S)
