"""Near-duplicates against all pairs compared exactly, and subsets against scores worked out one by one."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import membench
from membench.builtin.models.trained_tiny import UntrainedTiny
from membench.builtin.models.transformer import Llama
from membench.builtin.techniques.data_reduction import bits_per_byte, middle_first
from membench.data import corpus, sources
from membench.errors import SuiteError
from membench.plugins import Context, Shape, Unsuitable, registry
from membench.records.record import Record

if TYPE_CHECKING:
    from torch import nn


def _context(seed: int = 0, rehearsal: bool = False) -> Context:
    model = UntrainedTiny(seed=seed)
    return Context("cpu", 0, model, lambda name: contextlib.nullcontext(), {}, Path(), rehearsal=rehearsal)


def _kept(name: str, documents: Sequence[bytes], seed: int = 0, **options: Any) -> list[bytes]:
    return list(registry.create("technique", name, options).corpus(documents, _context(seed)))


def _words(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [f"{chance.randrange(10**6)}" for _ in range(count)]


def _changed(words: list[str], changes: int, seed: int) -> list[str]:
    """The same with so many of its words, evenly spread, made others."""
    others, step = _words(changes, seed), len(words) / max(1, changes)
    changed = list(words)
    for number, other in enumerate(others):
        changed[int(number * step)] = other
    return changed


def _text(words: Sequence[str]) -> bytes:
    return " ".join(words).encode()


def _jaccard(one: bytes, other: bytes, size: int) -> float:
    """Of the sets of all runs of so many words."""
    sets = []
    for document in (one, other):
        words = document.decode().split()
        sets.append({tuple(words[place : place + size]) for place in range(len(words) - size + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(("threshold", "shingle_words"), [(0.8, 5), (0.5, 3)])
def test_every_pair_well_above_the_threshold_is_found_and_none_below_it(threshold: float, shingle_words: int) -> None:
    originals = [_words(150, seed) for seed in range(60)]
    variants = [_changed(words, 1 + number // 2, 1000 + number) for number, words in enumerate(originals)]
    similarities = [
        _jaccard(_text(one), _text(other), shingle_words) for one, other in zip(originals, variants, strict=True)
    ]
    assert min(similarities) < threshold - 0.2
    assert max(similarities) > threshold + 0.1
    documents = [_text(words) for words in (*originals, *variants)]
    kept = _kept("dedup", documents, threshold=threshold, shingle_words=shingle_words)
    assert kept[:60] == documents[:60]
    for variant, similarity in zip(documents[60:], similarities, strict=True):
        if similarity >= threshold + 0.05:
            assert variant not in kept, similarity
        if similarity < threshold:
            assert variant in kept, similarity


def test_of_pairs_right_at_the_threshold_one_in_a_hundred_is_missed_at_most() -> None:
    for threshold, permutations in itertools.product((0.3, 0.5, 0.8, 0.95, 1.0), (64, 256)):
        options = {"threshold": threshold, "permutations": permutations}
        technique = registry.create("technique", "dedup", options)
        bands, size = technique.bands()
        assert bands >= 2
        assert bands * size <= permutations
        assert 1 - (1 - threshold**size) ** bands >= 0.99


def test_of_a_cluster_the_first_stays_and_a_document_between_two_connects_them() -> None:
    base = _words(200, 0)
    between = _changed(base, 3, 1)
    beyond = [*between[:33], *_changed(between[33:], 3, 2)]
    documents = [_text(base), _text(_words(200, 5)), _text(beyond), _text(between)]
    assert _jaccard(documents[0], documents[2], 5) < 0.8  # near only through what lies between
    assert _jaccard(documents[0], documents[3], 5) > 0.85
    assert _jaccard(documents[2], documents[3], 5) > 0.85
    assert _kept("dedup", documents) == documents[:2]
    assert _kept("dedup", documents[1:3]) == documents[1:3]
    assert _kept("dedup", documents[::-1]) == [documents[3], documents[1]]


def test_the_same_documents_stay_each_time_and_in_their_order() -> None:
    documents = [_text(_changed(_words(80, seed % 40), seed // 40, seed)) for seed in range(160)]
    kept = _kept("dedup", documents)
    assert 40 <= len(kept) < 160
    assert kept == _kept("dedup", documents)
    assert kept == [document for document in documents if document in set(kept)]
    assert kept == _kept("dedup", documents, seed=7)


def test_short_documents_blank_ones_and_bytes_that_are_no_text_are_compared_too() -> None:
    documents = [
        b"one two",
        b"one two three",
        b" one\n two ",
        b"\xff\xfe \x80",
        b"\xff\xfe\t\x80",
        b"\n",
        b"  ",
        b"one",
    ]
    assert _kept("dedup", documents) == [b"one two", b"one two three", b"\xff\xfe \x80", b"\n", b"one"]


def test_what_repeats_in_a_real_text_goes_and_the_figure_says_how_much() -> None:
    documents = sources.documents("topics", None)
    context = _context()
    kept = registry.create("technique", "dedup", {}).corpus(documents, context)
    before, repeated = sum(map(len, documents)), sum(map(len, documents)) - sum(map(len, set(documents)))
    percent, how = context.facts["corpus_kept_percent"]
    assert percent == pytest.approx(100 * sum(map(len, kept)) / before)
    assert len(set(kept)) == len(kept)
    assert before - sum(map(len, kept)) >= repeated > 0.05 * before
    assert f"{len(kept):,} of {len(documents):,} documents" in how
    assert f"{before:,} bytes" in how


def test_two_techniques_in_a_row_say_how_much_both_have_left() -> None:
    documents = [_text(_words(100, seed)) for seed in range(50)] * 2
    context = _context()
    for name, options in (("dedup", {}), ("subset", {"by": "random", "share": 0.5})):
        documents = list(registry.create("technique", name, options).corpus(documents, context))
    percent, how = context.facts["corpus_kept_percent"]
    assert percent == pytest.approx(25, abs=0.02)
    assert " documents, " in how.partition(", then ")[2]


def test_a_rehearsal_leaves_the_text_as_it_is() -> None:
    documents = [b"the same words each time and again"] * 100
    context = _context(rehearsal=True)
    for name, options in (("dedup", {}), ("subset", {"by": "random"})):
        assert registry.create("technique", name, options).corpus(documents, context) == documents
    assert not context.facts


@pytest.mark.parametrize("share", [0.1, 0.29, 0.9])
def test_a_random_subset_is_that_share_of_the_bytes_in_the_order_of_the_text(share: float) -> None:
    documents = [_text(_words(20 + seed % 50, seed)) for seed in range(300)]
    kept = _kept("subset", documents, by="random", share=share)
    assert sum(map(len, kept)) == round(share * sum(map(len, documents)))
    following = iter(documents)
    assert all(any(document.startswith(part) for document in following) for part in kept)
    assert sum(part not in documents for part in kept) <= 1  # the last that was taken is cut


def test_another_seed_gives_another_random_subset_and_the_same_seed_the_same() -> None:
    documents = [_text(_words(20, seed)) for seed in range(200)]
    zero, again, one = (_kept("subset", documents, seed, by="random") for seed in (0, 0, 1))
    assert zero == again
    assert len(set(zero) & set(one)) < len(zero) / 2


def test_documents_are_taken_from_the_middle_of_the_bytes_outwards() -> None:
    # By score: 10 bytes at 1.0, 60 at 2.0, 20 at 3.0, 10 at 4.0; half of the bytes lies in the second.
    assert middle_first([4.0, 2.0, 1.0, 3.0], [10, 60, 10, 20]) == [1, 3, 2, 0]
    scores = list(range(101))
    random.Random(0).shuffle(scores)
    middle = {scores[place] for place in middle_first(scores, [7] * 101)[:31]}
    assert middle == set(range(35, 66))


def _small_llama() -> nn.Module:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    shape = Shape(32, 2, 2, 2, 64, vocabulary=256, longest=512, tied=True)
    module: nn.Module = LlamaForCausalLM(Llama.of_shape(shape).config())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)
    return module.eval()


def test_a_document_costs_the_bits_of_its_bytes_each_given_those_before_it_in_its_piece() -> None:
    import torch

    module = _small_llama()
    chance = random.Random(0)
    documents = [chance.randbytes(size) for size in (1, 3, 255, 256, 257, 700, 5000)]
    for document, found in zip(documents, bits_per_byte(documents, module, "cpu"), strict=True):
        read = document[:4096]
        bits = 0.0
        for start in range(0, len(read), 256):
            before = b"\n" if start == 0 else read[start - 1 : start]
            ids = torch.tensor(list(before + read[start : start + 256]))
            with torch.no_grad():
                chances = module(ids[None]).logits[0].double().softmax(-1).tolist()
            bits -= sum(math.log2(chances[place][byte]) for place, byte in enumerate(ids[1:].tolist()))
        assert found == pytest.approx(bits / len(read), rel=1e-5)


_SUITE = """
[suite]
name = "less"
[matrix]
model = ["first", "second"]
technique = ["none", "dedup", "by-perplexity", "dedup+by-chance"]
workload = ["learn"]
[model.first]
use = "untrained-tiny"
[model.second]
use = "untrained-tiny"
seed = 1
[technique.by-perplexity]
use = "subset"
share = 0.3
[technique.by-chance]
use = "subset"
by = "random"
share = 0.3
[workload.learn]
use = "train"
data = "topics"
data_size = "60 KiB"
batch_size = 4
learning_rate = 3e-3
[settings]
measured_steps = 8
[[exclude]]
model = "second"
technique = ["dedup*", "by*"]
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("less")
    (folder / "less.toml").write_text(_SUITE)
    run = membench.run(membench.load_suite(folder / "less.toml"), output=folder)
    return {record.id: record for record in run.records}


def test_in_a_run_less_is_kept_and_what_is_learnt_from_it_is_measured(records: dict[str, Record]) -> None:
    reduced = ("dedup", "by-perplexity", "dedup+by-chance")
    figures = {name: records[f"first/{name}/learn/cpu"] for name in ("none", *reduced)}
    for record in figures.values():
        assert record.status == "ok", record.message
        assert not record.remarks
        assert 2 < (record.metrics["bits_per_byte"] or 0) < 8
    assert "corpus_kept_percent" not in figures["none"].metrics
    whole = figures["none"].metrics["data_bytes"] or 0
    for name in reduced:
        share = (figures[name].metrics["corpus_kept_percent"] or 0) / 100
        # Rows are of 128 tokens of eight bytes, and those that are not full are left out.
        assert figures[name].metrics["data_bytes"] == pytest.approx(whole * share, abs=1024 + 300)
    assert figures["by-perplexity"].metrics["corpus_kept_percent"] == pytest.approx(30, abs=0.01)
    deduplicated = figures["dedup"].metrics["corpus_kept_percent"] or 0
    assert deduplicated < 99.9
    assert figures["dedup+by-chance"].metrics["corpus_kept_percent"] == pytest.approx(0.3 * deduplicated, abs=0.01)


def test_another_seed_of_the_model_gives_other_weights_to_begin_with(records: dict[str, Record]) -> None:
    first, second = (records[f"{name}/none/learn/cpu"].metrics["final_loss_nats"] for name in ("first", "second"))
    assert first != second


def test_easy_and_noisy_documents_are_left_out_by_perplexity() -> None:
    technique = registry.create("technique", "subset", {"share": 0.5})
    technique.prepare(None, _context())
    plain = [paragraph for paragraph in corpus.split()[1].split(b"\n\n") if 200 < len(paragraph) < 400][:20]
    chance = random.Random(0)
    noise = [chance.randbytes(300) for _ in range(8)]
    easy = [b" " * 300 for _ in range(8)]
    kept = technique.corpus([*easy, *plain, *noise], _context())
    whole = [document for document in kept if document in plain]
    assert len(whole) >= len(kept) - 1  # one is cut
    assert not set(kept) & {*noise, *easy}


@pytest.mark.parametrize(
    ("technique", "said"),
    [
        ('use = "dedup"\nthreshold = 1.5', "threshold"),
        ('use = "subset"\nshare = 1.0', "share"),
        ('use = "subset"\nby = "length"', "by"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(tmp_path: Path, technique: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(
        '[suite]\nname = "wrong"\n[matrix]\nmodel = ["no-model"]\ntechnique = ["it"]\nworkload = ["read-data"]\n'
        f"[technique.it]\n{technique}\n"
    )
    with pytest.raises(SuiteError, match=said) as caught:
        membench.load_suite(path)
    assert "\n" not in str(caught.value)


def test_a_share_of_which_nothing_is_left_is_no_text_to_train_on() -> None:
    with pytest.raises(Unsuitable, match="nothing is left of 5 bytes of text"):
        _kept("subset", [b"a b c"], share=1e-9, by="random")
