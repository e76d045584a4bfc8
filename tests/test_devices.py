"""Devices by name: every figure has a source, and names are read as people write them."""

from __future__ import annotations

import tomllib
from importlib.resources import files

import pytest

from membench.errors import EXIT_BAD_INPUT, SuiteError
from membench.estimating.devices import Card, cards, of_memory, parse

GIB = 2**30
_TABLE = tomllib.loads((files("membench.estimating") / "devices.toml").read_text(encoding="utf-8"))
_ENTRIES = {name: entry for name, entry in _TABLE.items() if name != "overhead"}


def test_the_table_has_the_cards_of_every_kind() -> None:
    assert len(_ENTRIES) >= 25
    assert {entry["kind"] for entry in _ENTRIES.values()} == {"data-centre", "workstation", "consumer", "unified"}
    assert {entry["vendor"] for entry in _ENTRIES.values()} == {"NVIDIA", "AMD", "Apple"}


@pytest.mark.parametrize("name", _ENTRIES)
def test_every_entry_has_a_source_and_less_memory_than_its_label(name: str) -> None:
    entry = _ENTRIES[name]
    assert set(entry) == {"vendor", "kind", "label", "usable_gib", "source"}
    assert entry["source"].startswith("https://")
    number, unit = entry["label"].split()
    assert unit == "GB"
    share = entry["usable_gib"] / float(number)
    # Metal recommends two thirds of small memories and up to 84% of large ones.
    lowest, highest = (0.6, 0.85) if entry["vendor"] == "Apple" else (0.9, 1)
    assert lowest < share < highest
    if name.endswith("GB"):
        assert name.endswith(f"-{number}GB")
    assert parse(name).name == name


def test_a_card_is_what_the_table_says() -> None:
    entry, card = _ENTRIES["H100-80GB"], cards()["H100-80GB"]
    assert card == Card(
        "H100-80GB", "NVIDIA", "data-centre", "80 GB", round(79.11 * GIB), round(0.5 * GIB), entry["source"]
    )


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("8xH100-80GB", "H100-80GB", 8),
        ("8 x h100 80gb", "H100-80GB", 8),
        ("1024×A100_40GB", "A100-40GB", 1024),
        ("RTX-4090", "RTX-4090", 1),
        ("rtx 4090", "RTX-4090", 1),
        ("2Xrtx4090", "RTX-4090", 2),
        ("RTX 4090 24GB", "RTX-4090", 1),
        ("4xH200-141GB", "H200", 4),
        (" m2 max 96gb ", "M2-Max-96GB", 1),
    ],
)
def test_names_are_read_as_people_write_them(text: str, name: str, count: int) -> None:
    budget = parse(text)
    assert (budget.name, budget.count) == (name, count)
    assert budget.usable_bytes == cards()[name].usable_bytes
    assert budget.source == cards()[name].source


def test_a_process_in_a_group_takes_more_besides_torchs_allocations() -> None:
    alone, among_eight = parse("H100-80GB"), parse("8xH100-80GB")
    assert alone.overhead_bytes == _TABLE["overhead"]["cuda_context_gib"] * GIB
    assert among_eight.overhead_bytes - alone.overhead_bytes == _TABLE["overhead"]["nccl_gib"] * GIB
    assert alone.per_device_bytes == round(79.11 * GIB) - round(0.5 * GIB)


def test_torch_names_amds_devices_like_nvidias_and_apples_otherwise() -> None:
    assert [parse(name).torch_device for name in ("T4", "MI300X", "M1-16GB")] == ["cuda", "cuda", "mps"]
    assert parse("M1-16GB").overhead_bytes == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100", "'H100' is sold in several sizes; known: H100-80GB, H100-94GB; or state its memory"),
        ("4xa100", "'a100' is sold in several sizes; known: A100-40GB, A100-80GB; or state its memory"),
        ("M4", "'M4' is sold in several sizes; known: M4-16GB; or state its memory"),
        ("RTX-4091", "no device 'RTX-4091'; did you mean 'RTX-4090'?; or state its memory"),
        ("8xH100-80", "no device 'H100-80'; did you mean 'H100-80GB'?; or state its memory"),
        ("0xT4", "'0xT4': the number of devices is from 1 to 1000000"),
        (f"{'9' * 5000}xT4", "the number of devices is from 1 to 1000000"),
        ("2xM1-16GB", "torch cannot share work between Apple's devices; write 'M1-16GB'"),
        ("", "no device ''; known, among"),
    ],
)
def test_a_wrong_name_is_an_error_in_one_line_that_says_what_is_meant(text: str, said: str) -> None:
    with pytest.raises(SuiteError) as error:
        parse(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == EXIT_BAD_INPUT


def test_a_size_is_taken_as_it_is() -> None:
    assert of_memory("24GB").usable_bytes == of_memory("24GB").per_device_bytes == 24 * 1000**3
    budget = of_memory("24 GiB", 4)
    assert (budget.name, budget.count, budget.usable_bytes) == ("24 GiB", 4, 24 * GIB)
    assert (budget.overhead_bytes, budget.torch_device, budget.source) == (0, "cuda", None)


@pytest.mark.parametrize(
    ("text", "count", "said"),
    [("24", 1, "is no size"), ("0 GiB", 1, "has some memory"), ("1 GiB", 0, "from 1"), ("1 GiB", -1, "from 1")],
)
def test_what_is_no_size_is_an_error(text: str, count: int, said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        of_memory(text, count)
