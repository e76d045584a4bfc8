"""What a technique says that it saves, held against what is there."""

from __future__ import annotations

from membench.testing.holdings import SLACK_BYTES, Holding
from membench.units import format_bytes, format_ratio

_TOLERATED = 1.5
"""Factor between what is claimed and what is held: scales of layers as small as these weigh much."""


def wrong_with_weights(
    bits: float | None, share: float, before: dict[str, Holding], after: dict[str, Holding]
) -> str | None:
    """What is wrong with a claim about weights, seen at the layers that the technique changed."""
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    claimed = (32 if bits is None else bits) / 32 * share
    said = f"nominal_bits {'None' if bits is None else f'{bits:g}'}, nominal_share {share:g}"
    # Bits are absolute, so a claim about them holds for whatever type the model was built in.
    known = [before[path] for path in changed if path in before]
    plain_bytes = sum(held.bytes if bits is None else held.in_fp32_bytes for held in known)
    held_bytes = sum(after[path].bytes for path in changed if path in after)
    if not changed:
        nothing_claimed = abs(claimed - 1) < 0.01
        return (
            None
            if nothing_claimed
            else f"each layer holds as many bytes as before, and the technique claims to save some: {said}"
        )
    fewest, most = plain_bytes * claimed / _TOLERATED - SLACK_BYTES, plain_bytes * claimed * _TOLERATED + SLACK_BYTES
    if fewest <= held_bytes <= most:
        return None
    plain = (
        f"they held {format_bytes(plain_bytes)} before"
        if bits is None
        else f"in fp32 they would hold {format_bytes(plain_bytes)}"
    )
    return (
        f"the layers that it changed hold {format_bytes(held_bytes)}; {plain}, and the technique claims"
        f" {format_ratio(claimed)} of that ({said}): claim within a factor of {_TOLERATED:g}, or set nominal_share to"
        " None if it depends on the model"
    )


def wrong_with_states(claimed: float, held_bytes: int, parameters: int) -> str | None:
    """What is wrong with a claim about optimizer states."""
    held = held_bytes / max(1, parameters)
    if claimed / _TOLERATED <= held <= claimed * _TOLERATED:
        return None
    return (
        f"the optimizer keeps {held:.3g} bytes for a trained parameter, and nominal_state_bytes claims {claimed:g};"
        f" claim within a factor of {_TOLERATED:g}"
    )
