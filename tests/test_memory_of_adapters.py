"""What training adapters holds, byte by byte, of llama-15m plain and quantized."""

from __future__ import annotations

import pytest

import membench
from membench.records.record import Record

_PROJECTIONS = 6 * (4 * 288 * 288 + 3 * 288 * 768)
_OTHERS = 15_191_712 - _PROJECTIONS
_ROTARY_BYTES = 2 * 4 * 24  # frequencies, for each two of a head's 48 numbers, and as they were at first
_ADAPTERS = 6 * 8 * (4 * (288 + 288) + 3 * (288 + 768))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("adapters")
    path = folder / "adapters.toml"
    path.write_text(
        '[suite]\nname = "adapters"\n[matrix]\nmodel = ["llama-15m"]\nworkload = ["train"]\n'
        'technique = ["none", "lora", "qlora-32"]\n'
        "[settings]\nmeasured_steps = 1\n[technique.qlora-32]\nuse = 'qlora'\nblock_size = 32\n"
    )
    return {r.technique: r for r in membench.run(membench.load_suite(path), output=folder).records}


def test_trained_and_frozen_bytes_stand_apart(records: dict[str, Record]) -> None:
    metrics = records["lora"].metrics
    assert metrics["trained_weights_bytes"] == 4 * _ADAPTERS
    assert metrics["frozen_weights_bytes"] == 4 * (_PROJECTIONS + _OTHERS) + _ROTARY_BYTES
    packed = records["qlora-32"].metrics
    assert packed["trained_weights_bytes"] == 4 * _ADAPTERS
    assert packed["frozen_weights_bytes"] == (packed["weights_bytes"] or 0) - 4 * _ADAPTERS


def test_the_base_of_qlora_has_four_bits_a_weight_and_a_byte_a_block_of_32(records: dict[str, Record]) -> None:
    # A block of 32 has its largest in 8 bits, and 256 of these share an fp32 scale; a layer has tables of its own.
    base = _PROJECTIONS * (4 + 8 / 32 + 32 / (32 * 256)) / 8 + 6 * 7 * 4 * (16 + 256)
    measured = (records["qlora-32"].metrics["weights_bytes"] or 0) - 4 * _ADAPTERS - 4 * _OTHERS
    assert measured == pytest.approx(base, rel=0.005)


@pytest.mark.parametrize("technique", ["lora", "qlora-32"])
def test_training_holds_weights_and_gradients_and_states_of_adapters_alone(
    technique: str, records: dict[str, Record]
) -> None:
    metrics = records[technique].metrics
    assert metrics["optimizer_state_bytes"] == pytest.approx(8 * _ADAPTERS, rel=0.01)
    held = (metrics["weights_bytes"] or 0) + (4 + 8) * _ADAPTERS
    # Libraries keep some MiB of their own, now more and now less.
    assert metrics["held_live_bytes"] == pytest.approx(held, rel=0.1)


def test_the_peak_of_training_falls_by_the_states_of_what_is_frozen(records: dict[str, Record]) -> None:
    # The peak is where the backward pass begins: all logits are there, and no gradient yet.
    full, adapted = (records[name].metrics["peak_live_bytes"] or 0 for name in ("none", "lora"))
    assert full - adapted == pytest.approx(8 * (_PROJECTIONS + _OTHERS - _ADAPTERS), rel=0.1)
