"""Suites, good and bad, with the exact messages of the bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

import membench
from membench.errors import SuiteError
from membench.suite import lookup, selection
from membench.suite.loading import description
from tests.installing import install

_MATRIX = '[suite]\nname = "s"\n[matrix]\nmodel = ["llama-60m"]\ntechnique = ["bf16"]\nworkload = ["forward"]\n'
_SIZE = "write a size in B, KiB, MiB, GiB or TiB, such as '2 GiB'"
_DURATION = "write a duration in µs, ms, s, min or h, such as '200 ms'; a bare number is seconds"
_NAME = "a name has letters, digits, '.', '_' and '-' and nothing else"
_MANY_DIGITS = "9" * 400


def _with(**lists: str) -> str:
    """The matrix with other lists, as they are written in TOML."""
    text = _MATRIX
    for axis, written in lists.items():
        text = "\n".join(f"{axis} = {written}" if line.startswith(f"{axis} =") else line for line in text.split("\n"))
    return text


def _variant(kind: str, text: str) -> str:
    return f"{_MATRIX}[{kind}.x]\n{text}\n"


def _setting(text: str) -> str:
    return f"{_MATRIX}[settings]\n{text}\n"


def _limit(text: str) -> str:
    return f"{_MATRIX}[limits]\n{text}\n"


_FILE = {
    "[suite": "not valid TOML: Expected ']' at the end of a table declaration (at end of document)",
    "a = " + "[" * 5000: "not valid TOML: nested too deeply",
    "a = " + "9" * 5000: "not valid TOML: a number has thousands of digits",
    "": "'suite' is missing",
    '[suite]\nname = "s"\n': "'matrix' is missing",
    '[suite]\nname = "a b"\n': f"suite.name = 'a b': {_NAME}",
    '[suite]\nname = "a\\nb"\n': rf"suite.name = 'a\nb': {_NAME}",
    f'[suite]\nname = "{"a" * 65}"\n': f"suite.name = '{'a' * 65}': a name has 64 bytes at most",
    '[suite]\nname = "s"\ndescription = 3\n': "suite.description = 3: expected text",
    _MATRIX + "[setings]\nseed = 1\n": "unknown key 'setings'; did you mean 'settings'?",
    _MATRIX.replace("[matrix]", "[[matrix]]"): (
        "matrix = [{model = ['llama-60m'], technique = ['bf16'], workload = ['forward']}]: expected a table"
    ),
}

_NAMES = {
    _MATRIX.replace("workload", "worklod"): "unknown key 'matrix.worklod'; did you mean 'workload'?",
    _with(technique="[]"): "matrix.technique = []: must have at least 1 entry",
    _with(technique='"bf16"'): "matrix.technique = 'bf16': expected a list: ['bf16']",
    _with(technique="[3]"): "matrix.technique.0 = 3: expected text",
    _with(technique='[""]'): f"matrix.technique.0 = '': {_NAME}",
    _with(model='["llama-61m"]'): "matrix.model: no model is named 'llama-61m'; did you mean 'llama-60m'?",
    _with(model='["LLAMA-15M"]'): "matrix.model: no model is named 'LLAMA-15M'; did you mean 'llama-15m'?",
    _with(model=r'["llama\n60m"]'): rf"matrix.model.0 = 'llama\n60m': {_NAME}",
    _with(model=r'["llama\u001b[31m"]'): rf"matrix.model.0 = 'llama\x1b[31m': {_NAME}",
    _with(model='["llama-*"]'): "matrix.model.0 = 'llama-*': write whole names here; patterns are for [[exclude]]",
    _with(model=f'["{"a" * 300}"]'): f"matrix.model.0 = '{'a' * 77}…': a name has 64 bytes at most",
    _with(model='["pretrained"]'): (
        "matrix.model: model 'pretrained': option 'source' is missing; give it in [model.NAME] with use = 'pretrained'"
    ),
    _with(technique='["bf61"]'): "matrix.technique: no technique is named 'bf61'; did you mean 'bf16'?",
    _with(technique='["g46"]') + '[technique.g64]\nuse = "int8-weight-only"\n': (
        "matrix.technique: no technique is named 'g46'; did you mean 'g64'?"
    ),
    _with(technique='["none+bf16"]'): "matrix.technique.0 = 'none+bf16': 'none' has no place in a stack",
    _with(technique='["bf16+"]'): (
        "matrix.technique.0 = 'bf16+': a stack is written 'first+second'; one of its members has no name"
    ),
    _with(technique='["bf16 + fp16"]'): (
        "matrix.technique.0 = 'bf16 + fp16': a stack is written without spaces: 'bf16+fp16'"
    ),
    _with(technique='["fp16", "bf16+bf16"]'): "matrix.technique.1 = 'bf16+bf16': 'bf16' is in the stack twice",
    _with(technique='["half+bf16"]') + '[technique.half]\nuse = "bf16"\n': (
        "matrix.technique = 'half+bf16': 'half' and 'bf16' are the same"
    ),
    _with(workload='["forwards"]'): "matrix.workload: no workload is named 'forwards'; did you mean 'forward'?",
    _MATRIX + 'device = ["gpu"]\n': "matrix.device.0 = 'gpu': write cpu, cuda, cuda:0 or 2xcpu",
    _MATRIX + 'device = ["cuda:00"]\n': "matrix.device.0 = 'cuda:00': write cpu, cuda, cuda:0 or 2xcpu",
}

_VARIANTS = {
    _variant("technique", 'use = "bf61"'): "technique.x: no technique is named 'bf61'; did you mean 'bf16'?",
    _variant("model", 'size = "15m"'): "'model.x.use' is missing: name the model that this is a variant of",
    _variant("model", "use = 3"): "model.x.use = 3: expected the name of a model",
    _MATRIX + '[technique.a]\nuse = "b"\n[technique.b]\nuse = "bf16"\n': (
        "technique.a.use = 'b': that is a variant itself; name the technique that it is one of"
    ),
    _MATRIX + '[model]\nuse = "llama"\n': "model.use = 'llama': expected a table",
    _MATRIX + '[model."a\\nb"]\nuse = "llama"\n': rf"model.'a\nb': {_NAME}",
    _MATRIX + '[model."a+b"]\nuse = "llama"\n': f"model.'a+b': {_NAME}",
    _MATRIX + '[technique.none]\nuse = "bf16"\n': (
        "technique.none: every ratio is against it, so it cannot be a variant"
    ),
    _MATRIX + '[model.llama-15m]\nuse = "gpt2"\n': (
        "model.llama-15m: there is a model of that name already; give the variant another one"
    ),
    _MATRIX + '[workload.train]\nuse = "forward"\n': (
        "workload.train: there is a workload of that name already; give the variant another one"
    ),
    _variant("model", 'use = "llama-15m"\nsize = "60m"'): (
        "model.x: model 'llama-15m' sets size = '15m': option 'size' = '60m' contradicts its name"
    ),
    _variant("model", 'use = "llama"\nsize = "61m"'): (
        "model.x: model 'llama': option 'size' = '61m': did you mean '60m'?"
    ),
    _variant("model", 'use = "llama"\nsize = "huge"'): (
        "model.x: model 'llama': option 'size' = 'huge': expected '15m', '60m', '1b', '7b', '13b' or '70b'"
    ),
    _variant("workload", 'use = "train"\noptimizer = "adam"'): (
        "workload.x: workload 'train': option 'optimizer' = 'adam': did you mean 'adamw'?"
    ),
    _variant("model", 'use = "pretrained"'): "model.x: model 'pretrained': option 'source' is missing",
    _variant("technique", 'use = "int8-weight-only"\ngroupsize = 64'): (
        "technique.x: technique 'int8-weight-only': unknown option 'groupsize'; did you mean 'group_size'?"
    ),
    _variant("technique", 'use = "int8-weight-only"\ngroup_size = "64"'): (
        "technique.x: technique 'int8-weight-only': option 'group_size' = '64': expected a whole number"
    ),
    _variant("workload", 'use = "forward"\nbatch_size = true'): (
        "workload.x: workload 'forward': option 'batch_size' = true: expected a whole number"
    ),
    _variant("workload", 'use = "forward"\nbatch_size = 1_000_000_000_000'): (
        "workload.x: workload 'forward': option 'batch_size' = 1000000000000: must be at most 65536"
    ),
    _variant("workload", 'use = "train"\nlearning_rate = 0'): (
        "workload.x: workload 'train': option 'learning_rate' = 0: must be more than 0"
    ),
    _variant("workload", 'use = "train"\nlearning_rate = 1979-05-27'): (
        "workload.x: workload 'train': option 'learning_rate' = 1979-05-27: no option takes that"
    ),
    _with(technique='["x"]') + '[technique.x]\nuse = "int8-weight-only"\ngroup_size = 48\n': (
        "technique 'x' on model 'llama-60m' with workload 'forward': "
        "group_size = 48 does not divide the width 512 of the model's layers"
    ),
    _with(workload='["x"]') + '[workload.x]\nuse = "forward"\nsequence_length = 4096\n': (
        "workload 'x' needs 4096 tokens; model 'llama-60m' takes 2048 at most"
    ),
}

_INCLUDE = '[[include]]\nmodel = "llama-15m"\ntechnique = "bf16"\nworkload = "forward"\n'
_SELECTIONS = {
    _MATRIX + _INCLUDE.replace("15m", "61m"): (
        "include.0.model: no model is named 'llama-61m'; did you mean 'llama-60m'?"
    ),
    _MATRIX + _INCLUDE.replace("llama-15m", "llama-*"): (
        "include.0.model = 'llama-*': write whole names here; patterns are for [[exclude]]"
    ),
    _MATRIX + _INCLUDE.replace('technique = "bf16"\n', ""): "'include.0.technique' is missing",
    _MATRIX + _INCLUDE.replace('"bf16"', "3"): "include.0.technique = 3: expected text or a list of it",
    _MATRIX + _INCLUDE + 'device = "gpu"\n': "include.0.device = 'gpu': write cpu, cuda, cuda:0 or 2xcpu",
    _MATRIX + '[[exclude]]\nmodel = "gpt2"\n': (
        "exclude.0.model = 'gpt2' fits no model of the suite; known: llama-60m"
    ),
    _MATRIX + '[[exclude]]\nmodle = "gpt2"\n': "unknown key 'exclude.0.modle'; did you mean 'model'?",
    _MATRIX + "[[exclude]]\n": (
        "exclude.0 = {}: it would exclude every case; name a model, technique, workload or device"
    ),
    _MATRIX + '[[exclude]]\ntechnique = "none"\n': (
        "exclude.0 fits only the reference 'none', which every ratio is against"
    ),
    _MATRIX + '[[exclude]]\nmodel = "llama*"\n': "no case is left after [[exclude]]",
    _MATRIX + _INCLUDE.replace("forward", "train") + '[[exclude]]\nmodel = "llama-60m"\nworkload = "train"\n': (
        "exclude.0 = {model = ['llama-60m'], workload = ['train']} fits no case"
    ),
}

_SETTINGS = {
    _setting("repeat = 2"): "unknown key 'settings.repeat'; did you mean 'repeats'?",
    _setting('seed = "x"'): "settings.seed = 'x': expected a whole number",
    _setting("seed = 1979-05-27"): "settings.seed = 1979-05-27: expected a whole number",
    _setting("seed = 1.5"): "settings.seed = 1.5: expected a whole number",
    _setting("seed = true"): "settings.seed = true: expected a whole number",
    _setting("seed = -1"): "settings.seed = -1: must be at least 0",
    _setting("seed = 18446744073709551616"): (
        "settings.seed = 18446744073709551616: must be at most 9223372036854775807"
    ),
    _setting("repeats = 0"): "settings.repeats = 0: must be at least 1",
    _setting("repeats = 1_000_000"): "settings.repeats = 1000000: must be at most 1000",
    _setting("threads = 100_000"): "settings.threads = 100000: must be at most 1024",
    _setting("timeout_s = inf"): "settings.timeout_s = inf: must be finite",
    _setting('timeout_s = "5"'): "settings.timeout_s = '5': expected a number",
    _setting("timeout_s = 1e300"): "settings.timeout_s = 1e+300: must be at most 604800",
    _setting('isolation = "spwan"'): "settings.isolation = 'spwan': did you mean 'spawn'?",
    _setting('isolation = "thread"'): "settings.isolation = 'thread': expected 'fork' or 'spawn'",
}

_LIMITS = {
    _limit("peak_life = 2"): "limits.peak_life: no such metric; did you mean 'peak_live'?",
    _limit("peak_live = true"): f"limits.peak_live = true: {_SIZE}",
    _limit('peak_live = ["2 GiB"]'): f"limits.peak_live = ['2 GiB']: {_SIZE}",
    _limit("peak_live = 2"): f"limits.peak_live = 2: {_SIZE}",
    _limit('peak_live = "2 Gb"'): f"limits.peak_live = '2 Gb': {_SIZE}",
    _limit('peak_live = "-2 GiB"'): f"limits.peak_live = '-2 GiB': {_SIZE}",
    _limit(f'peak_live = "{_MANY_DIGITS} GiB"'): f"limits.peak_live = '{_MANY_DIGITS[:77]}…': {_SIZE}",
    _limit("time = -5"): "limits.time = -5: a limit must not be negative",
    _limit('time = "5 sec"'): f"limits.time = '5 sec': {_DURATION}",
    _limit("time = nan"): f"limits.time = nan: {_DURATION}",
    _limit(f"time = {_MANY_DIGITS}"): f"limits.time = a very large number: {_DURATION}",
    _limit('energy = "5 J"'): "limits.energy = '5 J': write a bare number of joules",
    _limit('kl = "5"'): "limits.kl = '5': write a bare number of nats a token",
    _limit('tokens_per_s = "5 s"'): "limits.tokens_per_s = '5 s': write a bare number of tokens a second",
    _limit('perplexity = "5"'): "limits.perplexity = '5': write a bare number, without a unit",
}

_BAD = _FILE | _NAMES | _VARIANTS | _SELECTIONS | _SETTINGS | _LIMITS


def _refused(path: Path) -> str:
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(path)
    said = str(caught.value)
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


@pytest.mark.parametrize("text", _BAD, ids=lambda text: _BAD[text][:60])
def test_a_bad_suite_gives_one_line_that_names_file_key_and_remedy(suite_file: Path, text: str) -> None:
    suite_file.write_text(text)
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(suite_file)
    assert str(caught.value) == f"{suite_file}: {_BAD[text]}"


def test_of_many_known_names_the_ten_nearest_are_listed(suite_file: Path) -> None:
    suite_file.write_text(_with(technique='["zzzzzzzz"]'))
    said = _refused(suite_file)
    assert said.startswith("matrix.technique: no technique is named 'zzzzzzzz'; known, among ")
    assert said.count(",") == 10


_SOURCES = {
    "./nowhere": "source = './nowhere': there is no such folder",
    "/nowhere/at/all": "source = '/nowhere/at/all': there is no such folder",
    "~/nowhere": "source = '~/nowhere': there is no such folder",
    "a/b/c": "source = 'a/b/c': there is no such folder",
    "./empty": "source = './empty': there is no config.json in that folder",
    "pickled": "source = 'pickled': there is no *.safetensors in that folder",
    "pickled/config.json": "source = 'pickled/config.json' is a file; name the folder that it lies in",
    "": "model 'pretrained': option 'source' = '': must have at least 1 character",
}


@pytest.mark.parametrize("source", _SOURCES)
def test_a_model_s_folder_that_is_not_there_is_found_before_anything_runs(
    suite_file: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(suite_file.parent)
    Path("empty").mkdir()
    Path("pickled").mkdir()
    Path("pickled", "config.json").touch()
    Path("pickled", "pytorch_model.bin").touch()
    suite_file.write_text(_variant("model", f'use = "pretrained"\nsource = "{source}"'))
    assert _refused(suite_file) == f"model.x: {_SOURCES[source]}"


_NETS = """\
import os
raise RuntimeError("a function is looked for in the text of its module, which is not run")
def wide(width, depth=2, *, heads): ...
if os.name:
    def conditional(): ...
class Plain:
    def method(self): ...
short = lambda: 1
"""
_ELSEWHERE = "in the current folder or on Python's path"
_FUNCTIONS = {
    "nets": "write 'package.module:function'",
    "a b:f": "'a b' is no module's name",
    "absent:f": f"there is no module 'absent' {_ELSEWHERE}",
    "absent.deep:f": f"there is no module 'absent' {_ELSEWHERE}",
    "pack.absent:f": "there is no module 'pack.absent' in package 'pack'",
    "nets.deep:f": "there is no module 'nets.deep': 'nets' is no package",
    "nets:absent": "module 'nets' has no 'absent'",
    "nets:method": "module 'nets' has no 'method'",
    "nets:wide": "it is called without arguments, but needs width, heads",
    "pack.typo:f": "{folder}/pack/typo.py, line 1: invalid syntax",
}


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules to look for functions in."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(_NETS)
    Path("pack").mkdir()
    Path("pack", "__init__.py").write_text("from pack.inner import *\n")
    Path("pack", "typo.py").write_text("def f(:\n")
    return tmp_path


@pytest.mark.parametrize("function", _FUNCTIONS)
def test_a_function_that_is_not_there_is_found_before_anything_runs(nets: Path, function: str) -> None:
    suite = nets / "known.toml"
    suite.write_text(_variant("model", f'use = "factory"\nfunction = "{function}"'))
    assert _refused(suite) == f"model.x: function = '{function}': {_FUNCTIONS[function].format(folder=nets)}"


@pytest.mark.parametrize(
    "function", ["nets:conditional", "nets:Plain", "nets:short", "pack:starred", "json:JSONDecoder", "os.path:join"]
)
def test_a_function_that_may_be_there_is_let_through(nets: Path, function: str) -> None:
    suite = nets / "known.toml"
    suite.write_text(_variant("model", f'use = "factory"\nfunction = "{function}"'))
    membench.load_suite(suite)


def _ids(path: Path, text: str, devices: list[str] | None = None) -> list[str]:
    path.write_text(text)
    return [case.id for case in membench.load_suite(path, devices).cases]


def _techniques(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [case.technique for case in membench.load_suite(path).cases]


def test_the_reference_is_added_where_the_suite_lacks_it(suite_file: Path) -> None:
    assert _ids(suite_file, _MATRIX) == ["llama-60m/none/forward/cpu", "llama-60m/bf16/forward/cpu"]


def test_the_parts_of_a_stack_are_added_before_it(suite_file: Path) -> None:
    stack = "bf16+int8-weight-only+g64"
    text = _with(technique=f'["{stack}", "int8-weight-only"]')
    text += '[technique.g64]\nuse = "int8-weight-only"\ngroup_size = 32\n'
    assert _techniques(suite_file, text) == ["none", "bf16", "bf16+int8-weight-only", "g64", stack, "int8-weight-only"]


def test_exclusions_reach_the_parts_of_a_stack_but_not_what_is_included(suite_file: Path) -> None:
    text = _with(technique='["bf16+int8-weight-only", "fp16"]') + '[[exclude]]\ntechnique = ["int8*", "fp16"]\n'
    assert _techniques(suite_file, text) == ["none", "bf16", "bf16+int8-weight-only"]
    text += '[[include]]\nmodel = "llama-60m"\ntechnique = ["fp16", "nf4+fp16"]\nworkload = "forward"\n'
    text += '[[exclude]]\ntechnique = "nf4"\n'
    assert _techniques(suite_file, text) == ["none", "bf16", "bf16+int8-weight-only", "fp16", "nf4+fp16"]


def test_a_group_that_is_excluded_whole_takes_its_reference_with_it(suite_file: Path) -> None:
    text = (
        _with(model='["llama-60m", "llama-15m"]', technique='["none", "bf16"]') + '[[exclude]]\nmodel = "llama-15m"\n'
    )
    assert _ids(suite_file, text) == ["llama-60m/none/forward/cpu", "llama-60m/bf16/forward/cpu"]


def test_what_is_excluded_is_not_asked_whether_it_fits(suite_file: Path) -> None:
    text = _with(model='["llama-60m", "llama-15m"]', technique='["g86"]')
    text += '[technique.g86]\nuse = "int8-weight-only"\ngroup_size = 86\n'
    suite_file.write_text(text)
    assert "group_size = 86 does not divide" in _refused(suite_file)
    text += '[[exclude]]\ntechnique = "g86"\n' + _INCLUDE
    assert _ids(suite_file, text) == ["llama-15m/none/forward/cpu", "llama-15m/bf16/forward/cpu"]


_FOLLOWER = """\
from membench.plugins import Technique
class Follower(Technique):
    def check(self, setting):
        return None if setting.before else "it must follow another technique"
"""


def test_a_part_that_is_wrong_alone_is_left_out(suite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = suite_file.parent / "site"
    monkeypatch.syspath_prepend(str(site))
    install(site, "followers", "[membench.techniques]\nfollower = followers:Follower\n", {"followers.py": _FOLLOWER})
    text = _with(technique='["bf16+follower"]').replace("llama-60m", "block").replace("forward", "known-burst")
    assert _techniques(suite_file, text) == ["none", "bf16", "bf16+follower"]
    suite_file.write_text(text.replace("bf16+follower", "follower"))
    assert _refused(suite_file) == (
        "technique 'follower' on model 'block' with workload 'known-burst': it must follow another technique"
    )


def test_devices_given_apart_replace_those_of_matrix_and_include(suite_file: Path) -> None:
    text = _MATRIX + _INCLUDE + 'device = "cuda"\n' + '[[exclude]]\ndevice = "cuda"\ntechnique = "fp*"\n'
    text = text.replace('["bf16"]', '["bf16", "fp16"]').replace("[[include]]", 'device = ["cpu", "cuda"]\n[[include]]')
    assert _ids(suite_file, text, ["cuda:1"]) == [
        "llama-60m/none/forward/cuda:1",
        "llama-60m/bf16/forward/cuda:1",
        "llama-60m/fp16/forward/cuda:1",
        "llama-15m/none/forward/cuda:1",
        "llama-15m/bf16/forward/cuda:1",
    ]


def test_a_device_that_is_none_is_blamed_on_whoever_gave_it(suite_file: Path) -> None:
    suite_file.write_text(_MATRIX)
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(suite_file, ["gpu"])
    assert str(caught.value) == "--device 'gpu': write cpu, cuda, cuda:0 or 2xcpu"


def test_selected_cases_keep_their_reference(suite_file: Path) -> None:
    suite_file.write_text(_MATRIX)
    chosen = membench.load_suite(suite_file).select(selection.parse("bf16 and not train"))
    assert [case.technique for case in chosen] == ["none", "bf16"]


def test_selected_stacks_keep_their_parts(suite_file: Path) -> None:
    suite_file.write_text(_with(technique='["bf16+int8-weight-only", "fp16"]', workload='["forward", "train"]'))
    chosen = membench.load_suite(suite_file).select(selection.parse("+int8 and forward"))
    assert [case.id for case in chosen] == [
        "llama-60m/none/forward/cpu",
        "llama-60m/bf16/forward/cpu",
        "llama-60m/int8-weight-only/forward/cpu",
        "llama-60m/bf16+int8-weight-only/forward/cpu",
    ]


def test_limits_take_sizes_and_durations_with_their_unit(suite_file: Path) -> None:
    limits = 'peak_live = "2 GiB"\ntime = "200 ms"\nwarmup_time = 5\ntokens_per_s = 10\nquality_loss = -0.01'
    suite_file.write_text(_limit(limits))
    assert membench.load_suite(suite_file).limits == {
        "peak_live_bytes": 2**31,
        "step_median_s": 0.2,
        "warmup_s": 5.0,
        "tokens_per_s": 10.0,
        "lost_bits_per_byte": -0.01,
    }


def test_a_valid_variant_need_not_be_used_and_whole_numbers_do_for_others(suite_file: Path) -> None:
    suite_file.write_text(_variant("workload", 'use = "train"\nlearning_rate = 1'))
    assert membench.load_suite(suite_file).cases


def _not_found(name: str | Path) -> str:
    with pytest.raises(SuiteError) as caught:
        membench.load_suite(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_a_suite_s_and_a_path_is_a_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("budget.toml").write_text(_MATRIX)
    Path("quickstart").write_text("whatever lies about under the name of a suite")
    assert membench.load_suite("quickstart").name == "quickstart"
    assert membench.load_suite("budget.toml").name == membench.load_suite("./budget.toml").name == "s"
    assert _not_found("quickstrat") == "no suite is named 'quickstrat'; did you mean 'quickstart'?"
    assert _not_found("budget") == "no suite is named 'budget'; did you mean 'budget.toml'?"
    assert _not_found("budgte.toml") == "'budgte.toml': there is no such file; did you mean 'budget.toml'?"
    assert _not_found("./quickstart.toml") == "'quickstart.toml': there is no such file"
    assert _not_found("quickstart.toml") == (
        "'quickstart.toml': there is no such file; for the suite of that name write 'quickstart'"
    )
    assert _not_found("nowhere/quickstart") == "'nowhere/quickstart': there is no such file"
    assert _not_found("a" * 300) == f"'{'a' * 77}…': File name too long"
    assert _not_found("a\nb.toml") == r"'a\nb.toml': there is no such file"


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # long names are cut short
    folder, binary, loop = tmp_path / "folder.toml", tmp_path / "binary.toml", tmp_path / "loop.toml"
    folder.mkdir()
    binary.write_bytes(b"[suite]\nname = \xff\n")
    loop.symlink_to(loop)
    assert _not_found(folder) == f"{folder} is a folder; name the .toml file of a suite"
    assert _not_found(binary) == f"{binary}: not UTF-8, as TOML must be: byte 0xff in line 2"
    assert _not_found(Path("loop.toml")) == "'loop.toml': there is no such file"
    assert _not_found("/dev/null/x.toml") == "'/dev/null/x.toml': there is no such file"
    assert _not_found(Path("/dev/zero")) == "/dev/zero is no file that a suite can be read from"


def test_a_file_that_may_not_be_read_is_refused(suite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    suite_file.write_text(_MATRIX)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert _not_found(suite_file) == f"{suite_file} cannot be read: Permission denied"


def test_a_description_is_one_line_and_does_not_steer_the_terminal(suite_file: Path) -> None:
    suite_file.write_text('[suite]\nname = "s"\ndescription = """\nTwo \\u001b[31mlines\nof text"""\n')
    assert description(suite_file) == r"Two \x1b[31mlines"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a and", "-k 'a and': something is missing at the end"),
        ("(a", "-k '(a': something is missing at the end"),
        ("a b", "-k 'a b': 'b' stands where 'and' or 'or' belongs"),
        ("or", "-k 'or': 'or' stands where a part of an id belongs"),
        ("not", "-k 'not': something is missing at the end"),
        ("(a\n", r"-k '(a\n': something is missing at the end"),
        ("(" * 5000, "-k: more than 100 brackets and 'not' within each other"),
    ],
)
def test_a_bad_expression_is_refused(expression: str, message: str) -> None:
    with pytest.raises(SuiteError) as caught:
        selection.parse(expression)
    assert str(caught.value) == message


def test_an_expression_joins_parts_of_ids() -> None:
    keep = selection.parse("bf16 and not (train or generate)")
    assert [keep(id) for id in ("m/bf16/forward", "m/bf16/train", "m/fp16/forward")] == [True, False, False]
    assert selection.parse(" or ".join(["absent"] * 5000 + ["here"]))("here")


def test_every_suite_that_comes_along_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = sorted(path.stem for path in (Path(__file__).parent.parent / "suites").glob("*.toml"))
    assert sorted(name for name, suite in lookup.named().items() if suite.origin.startswith("membench ")) == own
    for name in own:
        assert membench.load_suite(f"membench:{name}").cases
