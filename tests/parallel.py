"""Suites of cases on several ranks, each run once for several tests, with a small decoder of known size."""

from __future__ import annotations

from pathlib import Path

import membench
from membench.cli import main
from membench.records.record import Record
from membench.records.run_file import newest_run, read_run

WIDTH, INNER_WIDTH, LAYERS, HEADS, VOCABULARY = 192, 512, 4, 4, 4096
LAYER_BYTES = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER_WIDTH + 2 * WIDTH)
EMBEDDING_BYTES = 4 * VOCABULARY * WIDTH
WEIGHTS_BYTES = LAYERS * LAYER_BYTES + 2 * EMBEDDING_BYTES + 4 * WIDTH
"""Of all parameters in fp32; the output head is as large as the embedding and its own."""

MODEL = f"""
[model.small]
use = "config"
source = "llama"
[model.small.overrides]
hidden_size = {WIDTH}
intermediate_size = {INNER_WIDTH}
num_hidden_layers = {LAYERS}
num_attention_heads = {HEADS}
num_key_value_heads = {HEADS}
vocab_size = {VOCABULARY}
tie_word_embeddings = false
"""

SETTINGS = """
[settings]
warmup_steps = 1
measured_steps = 1
evaluate_s = 0
calm_within_s = 0
"""


def run(suite: str, folder: Path) -> dict[str, Record]:
    """Run a suite's text with the model ``small`` and few steps; return its records by id."""
    (folder / "suite.toml").write_text(f"{suite}\n{MODEL}\n{SETTINGS}")
    assert main(["run", str(folder / "suite.toml"), "--output", str(folder / "results")]) == 0
    return {record.id: record for record in read_run(newest_run(folder / "results")).records}


def estimates(suite: str, folder: Path) -> dict[str, Record]:
    """Estimate a suite's text with the model ``small`` and few steps; return its records by technique."""
    (folder / "suite.toml").write_text(f"{suite}\n{MODEL}\n{SETTINGS}")
    found = membench.estimate(membench.load_suite(folder / "suite.toml"))
    return {record.case["technique"]: record for record in found.records}
