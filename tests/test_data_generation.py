"""The generator: bytes by formula, text as a plain loop samples it, and a corpus made of what it has learnt."""

from __future__ import annotations

import contextlib
import lzma
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import membench
from membench.builtin.models.trained_tiny import TrainedTiny, UntrainedTiny
from membench.builtin.techniques.data_generation import generated, keep, kept
from membench.data import sources
from membench.errors import SuiteError
from membench.plugins import Context, Corpus, Unsuitable, registry

if TYPE_CHECKING:
    from torch import nn

_MODEL = TrainedTiny()
_TOPICS = Corpus("topics", 2**30, length=128, batch_size=2, workers=0)


@pytest.fixture(scope="module", autouse=True)
def _undisturbed() -> Iterator[None]:
    """On one thread; what libraries warn of while they are imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers.models.llama.modeling_llama  # noqa: F401
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _context(folder: Path = Path(), seed: int = 0, **given: Any) -> Context:
    return Context("cpu", seed, _MODEL, lambda name: contextlib.nullcontext(), {}, folder, **given)


def _module() -> nn.Module:
    """Random weights, made large, so that some bytes are far likelier than others."""
    import torch

    module = UntrainedTiny.model_validate({}).build(_context())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8 if "embed" in name else 3)
    return module.eval()


def test_each_weight_is_kept_to_half_a_step_of_its_row_in_a_byte_and_two_for_each_row(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    module, path = _module(), tmp_path / "generator.safetensors"
    keep(module, path)
    read, stored = dict(kept(path).named_parameters()), load_file(path)
    wanted = 0
    for name, parameter in module.named_parameters():
        wanted += 2 * parameter.numel() if parameter.ndim < 2 else parameter.numel() + 2 * len(parameter)
        if parameter.ndim < 2:
            assert (read[name] - parameter).abs().max() <= parameter.abs().max() * 2**-11
        else:
            step = parameter.abs().amax(1, keepdim=True) / 127
            assert ((read[name] - parameter).abs() <= step * 0.57).all()  # half, and what float16 takes off the scale
            assert (stored[name].abs().amax(1) == 127).all()  # the largest of a row takes the last code
    head_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == wanted + head_bytes
    assert head_bytes < 5000


def test_text_is_what_a_loop_without_cache_samples_from_the_last_bytes_that_it_has_learnt_to_read() -> None:
    import torch

    module, random_numbers = _module(), torch.Generator().manual_seed(3)
    text = [list(b"\n\n") for _ in range(2)]  # 700 bytes: two streams
    while len(text[0]) < 2 + 350:
        made = len(text[0])
        # A window is filled up to 256 bytes; the next begins with the last 128 of what there is.
        begin = 0 if made < 256 else (made - 128) // 128 * 128
        with torch.no_grad():
            logits = module(torch.tensor(text)[:, begin:]).logits[:, -1]
        chosen = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=random_numbers)
        for row, byte in zip(text, chosen.flatten().tolist(), strict=True):
            row.append(byte)
    assert generated(module, b"\n\n", 700, 0.7, 3, "cpu") == [bytes(row[2:]) for row in text]


@pytest.mark.parametrize("size", [1, 300, 1024, 40_001])
def test_as_many_bytes_are_generated_as_were_asked_for(size: int) -> None:
    assert sum(map(len, generated(_module(), b"\0", size, 1.0, 0, "cpu"))) == size


def test_a_seed_gives_its_own_text_and_gives_it_again_and_coldness_the_likeliest() -> None:
    module = _module()
    first, again, other = (generated(module, b"\0", 2000, 1.0, seed, "cpu") for seed in (0, 0, 1))
    assert first == again
    assert first != other
    cold = [generated(module, b"\0", 600, 0.01, seed, "cpu") for seed in (0, 1)]
    assert cold[0] == cold[1]


_WORDS = [b"alpha", b"beta", b"gamma", b"delta"]


def _sentences(count: int) -> list[bytes]:
    chance = random.Random(0)
    return [b" ".join(chance.choices(_WORDS, k=chance.randint(3, 9))) for _ in range(count)]


def test_a_generator_trained_on_a_corpus_gives_documents_of_its_words(tmp_path: Path) -> None:
    documents, context = _sentences(1000), _context(tmp_path)
    technique = registry.create("technique", "lm-generated", {"steps": 200, "generated_size": "20 KiB"})
    made = technique.corpus(documents, context)
    assert 19_000 < sum(map(len, made)) <= 20 * 1024
    words = [word for document in made for word in document.split()]
    right = sum(word in _WORDS for word in words) / len(words)
    assert right > 0.9
    new = [document for document in made if document not in set(documents)]
    assert len(new) > len(made) / 4  # it does not only say by heart
    size, how = context.facts["data_bytes"]
    assert size == (tmp_path / "generator.safetensors").stat().st_size
    assert "trained for 200 steps in " in how
    assert "20,480 bytes" in how


def test_paragraphs_come_as_those_of_the_text_itself_each_with_its_blank_line(tmp_path: Path) -> None:
    documents = sources.documents("topics", 2**30)  # more than there is
    technique = registry.create("technique", "lm-generated", {"generated_size": 16_000})
    context = _context(tmp_path, corpus=_TOPICS)
    technique.prepare(None, context)
    made = technique.corpus(documents, context)
    assert "trained-tiny's own weights" in context.facts["data_bytes"][1]
    assert sum(map(len, made)) == 16_000
    assert all(b"\n\n" not in document[:-2] for document in made)
    streams = 16_000 // 256
    assert sum(not document.endswith(b"\n\n") for document in made) <= streams
    assert len(made) > 1.5 * streams


@pytest.mark.parametrize(
    ("options", "corpus"), [({}, _TOPICS._replace(most_bytes=2**16)), ({"steps": 9}, _TOPICS), ({}, None)]
)
def test_trained_tiny_is_not_trained_where_a_generator_of_its_own_is(
    options: dict[str, Any], corpus: Corpus | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry.create("technique", "lm-generated", options).prepare(None, _context(tmp_path, corpus=corpus))
    assert not (tmp_path / "cache").exists()


def test_too_little_text_to_learn_from_is_said(tmp_path: Path) -> None:
    technique = registry.create("technique", "lm-generated", {"steps": 1})
    with pytest.raises(Unsuitable, match="512 bytes to learn from, and the data have 12"):
        technique.corpus([b"hello", b"world"], _context(tmp_path))


def test_a_rehearsal_takes_one_step_and_leaves_the_text_as_it_is(tmp_path: Path) -> None:
    documents = _sentences(100)
    technique = registry.create("technique", "lm-generated", {})
    context = _context(tmp_path, rehearsal=True)
    technique.prepare(None, context)
    assert technique.corpus(documents, context) == documents
    assert "trained for 1 steps" in context.facts["data_bytes"][1]


def test_in_a_run_the_generator_is_what_is_kept_and_it_is_larger_than_its_text_compressed(tmp_path: Path) -> None:
    path = tmp_path / "generated.toml"
    path.write_text(
        '[suite]\nname = "generated"\n[matrix]\nmodel = ["untrained-tiny"]\ntechnique = ["none", "generated"]\n'
        'workload = ["learn"]\n[technique.generated]\nuse = "lm-generated"\ngenerated_size = "32 KiB"\n'
        '[workload.learn]\nuse = "train"\ndata = "topics"\nbatch_size = 4\nlearning_rate = 3e-3\n'
        "[settings]\nmeasured_steps = 8\n"
    )
    run = membench.run(membench.load_suite(path), output=tmp_path)
    plain, made = run.records
    assert (plain.status, made.status) == ("ok", "ok"), made.message
    text = b"".join(sources.documents("topics", None))
    assert len(lzma.compress(text)) < (made.metrics["data_bytes"] or 0) < len(text)
    assert "trained-tiny's own weights" in made.obtained["data_bytes"]["source"]
    assert "32,768 bytes" in made.obtained["data_bytes"]["source"]
    assert (made.metrics["store_s"] or 0) > (plain.metrics["store_s"] or 0)
    assert 2 < (made.metrics["bits_per_byte"] or 0) < 8
    assert not made.remarks


@pytest.mark.parametrize(
    ("option", "said"), [("temperature = 0.0", "temperature"), ('generated_size = "big"', "'big' is no size")]
)
def test_options_that_make_no_sense_are_refused_in_one_line(tmp_path: Path, option: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(
        '[suite]\nname = "wrong"\n[matrix]\nmodel = ["no-model"]\ntechnique = ["it"]\nworkload = ["read-data"]\n'
        f'[technique.it]\nuse = "lm-generated"\n{option}\n'
    )
    with pytest.raises(SuiteError, match=said) as caught:
        membench.load_suite(path)
    assert "\n" not in str(caught.value)
