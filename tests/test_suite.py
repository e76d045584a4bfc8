"""Suites, good and bad, with the exact messages of the bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

import membench
from membench import selection
from membench.errors import SuiteError
from membench.suite import suites

_MATRIX = '[suite]\nname = "s"\n[matrix]\nmodel = ["llama-60m"]\ntechnique = ["bf16"]\nworkload = ["forward"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[suite", "not valid TOML: Expected ']' at the end of a table declaration (at end of document)"),
        ('[suite]\nname = "s"\n', "'matrix' is missing"),
        (_MATRIX + "[setings]\nseed = 1\n", "unknown key 'setings'; did you mean 'settings'?"),
        (_MATRIX + "[settings]\nrepeat = 2\n", "unknown key 'settings.repeat'; did you mean 'repeats'?"),
        (_MATRIX + '[settings]\nseed = "x"\n', "settings.seed = 'x': input should be a valid integer"),
        (
            _MATRIX + "[settings]\nrepeats = 0\n",
            "settings.repeats = 0: input should be greater than or equal to 1",
        ),
        (
            _MATRIX.replace('["bf16"]', "[]"),
            "matrix.technique = []: list should have at least 1 item after validation, not 0",
        ),
        (
            _MATRIX.replace("llama-60m", "llama-61m"),
            "matrix.model: no model is named 'llama-61m'; did you mean 'llama-60m'?",
        ),
        (_MATRIX.replace("bf16", "bf61"), "matrix.technique: no technique is named 'bf61'; did you mean 'bf16'?"),
        (_MATRIX.replace("bf16", "none+bf16"), "matrix.technique = 'none+bf16': 'none' has no place in a stack"),
        (
            _MATRIX.replace("bf16", "g64") + '[technique.g64]\nuse = "int8-weight-only"\ngroupsize = 64\n',
            "technique.g64: technique 'int8-weight-only' has no option 'groupsize'; did you mean 'group_size'?",
        ),
        (
            _MATRIX.replace("forward", "long") + '[workload.long]\nuse = "forward"\nsequence_length = 4096\n',
            "workload 'long' needs 4096 tokens; model 'llama-60m' takes 2048 at most",
        ),
        (
            _MATRIX + '[limits]\npeak_live = "2 GB"\n',
            "limits.peak_live: '2 GB' is no size; write a number and B, KiB, MiB, GiB or TiB, such as '2 GiB'",
        ),
        (
            _MATRIX + "[settings]\ntimeout_s = inf\n",
            "settings.timeout_s = inf: input should be a finite number",
        ),
        (
            _MATRIX + '[technique.none]\nuse = "bf16"\n',
            "technique.none: every ratio is against it, so it cannot be a variant",
        ),
        (_MATRIX + "[limits]\npeak_life = 2\n", "limits.peak_life: no such metric; did you mean 'peak_live'?"),
        (_MATRIX + '[[exclude]]\nmodel = "gpt2"\n', "exclude.0 = {'model': ['gpt2']} matches no case"),
    ],
)
def test_a_bad_suite_gives_one_line_that_names_file_key_and_remedy(suite_file: Path, text: str, message: str) -> None:
    suite_file.write_text(text)
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(suite_file)
    assert str(caught.value) == f"{suite_file}: {message}"


def test_the_reference_is_added_where_the_suite_lacks_it(suite_file: Path) -> None:
    suite_file.write_text(_MATRIX)
    ids = [case.id for case in membench.load_suite(suite_file).cases]
    assert ids == ["llama-60m/none/forward/cpu", "llama-60m/bf16/forward/cpu"]


def test_selected_cases_keep_their_reference(suite_file: Path) -> None:
    suite_file.write_text(_MATRIX)
    chosen = membench.load_suite(suite_file).select(selection.parse("bf16 and not train"))
    assert [case.technique for case in chosen] == ["none", "bf16"]


@pytest.mark.parametrize("expression", ["a and", "(a", "a b", "or", "not"])
def test_a_bad_expression_is_refused(expression: str) -> None:
    with pytest.raises(SuiteError):
        selection.parse(expression)


def test_every_suite_that_comes_along_can_be_read() -> None:
    assert "quickstart" in suites()
    for name in suites():
        assert membench.load_suite(name).cases
