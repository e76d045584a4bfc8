"""Labelled samples kept whole, in part, as prototypes or as a generator: their bytes, and what is learnt from them."""

from __future__ import annotations

import dataclasses
import itertools
import lzma
import math
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest

import membench
from membench import plugins
from membench.builtin.models.classifier import Classifier
from membench.builtin.models.transformer import Llama
from membench.builtin.techniques.sample_generation import Gan, KmeansPrototypes, SampleSubset, shares
from membench.builtin.workloads.train import Train
from membench.builtin.workloads.train_classifier import TrainClassifier
from membench.data import samples
from membench.data.samples import StoredSamples
from membench.errors import SuiteError
from membench.records.record import Record
from tests.training import context

if TYPE_CHECKING:
    from membench.builtin.techniques.gan_training import GeneratedSamples

_CLASSIFIER = Classifier.model_validate({})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _context(seed: int = 0) -> plugins.Context:
    return dataclasses.replace(context(_CLASSIFIER), seed=seed)


def _two_points() -> StoredSamples:
    """Of each of two classes 40 samples, at two points each: 0 has its first features set, 1 its last ones."""
    points = numpy.array([[9, 9, 0, 0], [9, 0, 0, 0], [0, 0, 9, 9], [0, 0, 0, 9]], numpy.uint8)
    return StoredSamples(points.repeat(20, axis=0), numpy.array([0, 1], numpy.uint8).repeat(40), 2, largest=10)


def _keys(stored: StoredSamples) -> set[tuple[bytes, int]]:
    return {(row.tobytes(), int(label)) for row, label in zip(stored.features, stored.labels, strict=True)}


def test_all_digits_are_there_and_none_stands_on_both_sides() -> None:
    train, held_out = samples.read("digits")
    assert len(train.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) / 1797 == pytest.approx(77 / 256, abs=0.04)
    assert not {row for row, _ in _keys(train)} & {row for row, _ in _keys(held_out)}
    assert (train.width, train.classes, int(train.features.max())) == (64, 10, 16)
    assert train.kept_bytes == len(train.labels) * 65


def test_every_class_of_the_text_has_samples_to_learn_from_and_to_be_asked() -> None:
    train, held_out = samples.read("topics-text")
    assert (train.width, train.classes) == (512, 5)
    assert numpy.bincount(train.labels, minlength=5).min() > 50
    assert numpy.bincount(held_out.labels, minlength=5).min() > 20
    assert not {row for row, _ in _keys(train)} & {row for row, _ in _keys(held_out)}


def test_a_paragraph_is_the_roots_of_its_grams_counts_by_their_checksum() -> None:
    from pydoc_data import topics

    paragraph = topics.topics["assert"].split("\n\n")[1]
    buckets: Counter[int] = Counter()
    for word in re.findall(r"\w+", paragraph.lower()):
        marked = f"^{word}$"
        grams = [marked] if len(marked) < 4 else [marked[at : at + 4] for at in range(len(marked) - 3)]
        buckets.update(zlib.crc32(gram.encode()) % 512 for gram in grams)
    length = math.sqrt(sum(buckets.values()))
    expected = bytes(round(255 * math.sqrt(buckets[bucket]) / length) for bucket in range(512))
    assert (expected, list(samples.CHAPTERS).index("statements")) in set().union(
        *map(_keys, samples.read("topics-text"))
    )


@pytest.mark.parametrize("size", [7, 64, 200])
def test_an_epoch_of_batches_holds_every_sample_once_with_its_class(size: int) -> None:
    features = numpy.arange(160, dtype=numpy.uint8).reshape(80, 2)
    stored = StoredSamples(features, features[:, 0] // 80, 2, largest=200)
    batches = itertools.islice(stored.batches(size, seed=3), -(-400 // size))
    rows = numpy.concatenate([batch.numpy() for batch in batches])[:400]
    for epoch in rows.reshape(5, 80, 3):
        numbers = epoch[epoch[:, 0].argsort()]
        assert (numbers[:, :2] * 200).round().tolist() == features.tolist()
        assert numbers[:, 2].tolist() == stored.labels.tolist()
    assert rows[:80].tolist() != rows[80:160].tolist()


def _packed_bytes(stored: StoredSamples) -> int:
    return len(lzma.compress(stored.features.tobytes() + stored.labels.tobytes(), preset=9 | lzma.PRESET_EXTREME))


def test_a_subset_is_real_samples_of_the_bytes_it_is_given_each_class_by_its_share() -> None:
    train, _ = samples.read("digits")
    technique = SampleSubset.model_validate({"size": "11700 B"})
    kept = technique.samples(train, _context())
    assert isinstance(kept, StoredSamples)
    assert kept.kept_bytes == _packed_bytes(kept)
    assert 0.97 * 11700 < kept.kept_bytes <= 11700
    count = len(kept.labels)
    assert count > 2.5 * 11700 / 65  # than there would be without compression
    assert _keys(kept) <= _keys(train)
    parts = numpy.bincount(train.labels) / len(train.labels)
    assert abs(numpy.bincount(kept.labels) - count * parts).max() < 1
    again, other = technique.samples(train, _context()), technique.samples(train, _context(seed=1))
    assert isinstance(again, StoredSamples)
    assert isinstance(other, StoredSamples)
    assert _keys(again) == _keys(kept) != _keys(other)


@pytest.mark.parametrize(("count", "counts"), [(2, [1, 1]), (10, [9, 1]), (100, [98, 2])])
def test_of_few_samples_each_class_has_one(count: int, counts: list[int]) -> None:
    features = numpy.zeros((100, 4), numpy.uint8)
    lopsided = StoredSamples(features, (numpy.arange(100) > 97).astype(numpy.uint8), 2, largest=1)
    assert shares(lopsided, count).tolist() == counts


def test_one_prototype_of_a_class_is_its_mean() -> None:
    train, _ = samples.read("digits")
    kept = KmeansPrototypes(per_class=1).samples(train, _context())
    assert isinstance(kept, StoredSamples)
    for label in range(10):
        mean = train.features[train.labels == label].mean(axis=0)
        assert abs(kept.features[label] - mean).max() <= 0.5 + 1e-5
    assert kept.labels.tolist() == list(range(10))


def test_prototypes_are_the_points_where_the_samples_lie() -> None:
    kept = KmeansPrototypes(per_class=2).samples(_two_points(), _context())
    assert isinstance(kept, StoredSamples)
    assert _keys(kept) == _keys(_two_points())
    assert kept.kept_bytes == _packed_bytes(kept)


def test_a_generator_takes_a_byte_a_weight_and_four_an_output() -> None:
    train, _ = samples.read("digits")
    kept = Gan(hidden=48, latent=12, steps=1).samples(train, _context())
    weights = (12 + 10) * 48 + 48 * 48 + 48 * 64
    assert kept.kept_bytes == weights + 4 * (48 + 48 + 64) + 4 * 10
    assert (kept.width, kept.classes) == (64, 10)


def test_weights_of_a_generator_are_rounded_to_the_nearest_of_255_levels() -> None:
    import torch

    from membench.builtin.techniques.gan_training import Int8Layer

    torch.manual_seed(0)
    layer = torch.nn.Linear(30, 20)
    rounded = Int8Layer.of(layer)
    weight, bias = rounded.numbers()
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    assert rounded.weight.dtype == torch.int8
    assert ((weight - layer.weight).abs() <= scale * 0.5 + scale * 127 / 2**11).all()
    assert torch.allclose(bias, layer.bias, rtol=1e-3)


def _generated(seed: int = 0, steps: int = 400) -> GeneratedSamples:
    from membench.builtin.techniques.gan_training import GeneratedSamples

    made = Gan(hidden=16, latent=4, steps=steps).samples(_two_points(), _context(seed))
    assert isinstance(made, GeneratedSamples)
    return made


def test_a_generator_learns_where_the_samples_of_a_class_lie() -> None:
    batch = next(_generated().batches(2000, seed=0))
    made, labels = batch[:, :-1].numpy(), batch[:, -1].numpy()
    assert made.min() >= 0
    assert made.max() <= 1
    assert numpy.bincount(labels.astype(int)).tolist() == pytest.approx([1000, 1000], rel=0.1)
    assert made[labels == 0].mean(axis=0) == pytest.approx([0.9, 0.45, 0, 0], abs=0.15)
    assert made[labels == 1].mean(axis=0) == pytest.approx([0, 0, 0.45, 0.9], abs=0.15)


def test_a_seed_decides_the_generator_and_what_is_drawn_and_nothing_else_is_touched() -> None:
    import torch

    def drawn(seed: int, of: int) -> list[float]:
        numbers: list[float] = next(_generated(seed, steps=3).batches(5, of)).flatten().tolist()
        return numbers

    before = torch.random.get_rng_state()
    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_layer_of_the_discriminator_has_spectral_norm_1() -> None:
    import torch

    from membench.builtin.layers.conditional_gan import Discriminator

    torch.manual_seed(0)
    discriminator = Discriminator(16, 3, 24)
    for _ in range(200):
        discriminator(torch.rand(8, 16), torch.randint(0, 3, (8,)))
    layers = [module for module in discriminator.modules() if hasattr(module, "parametrizations")]
    assert len(layers) == 4
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.01)


def test_where_no_samples_are_trained_on_techniques_for_them_are_refused() -> None:
    train, of_samples = Train.model_validate({}), TrainClassifier.model_validate({})
    for technique in (Gan.model_validate({}), KmeansPrototypes.model_validate({}), SampleSubset.model_validate({})):
        refused = technique.refuse(plugins.Setting(_CLASSIFIER, train, "cpu", (), ()))
        assert refused == "it is about labelled samples, and this workload trains on none: use train-classifier"
        assert technique.refuse(plugins.Setting(_CLASSIFIER, of_samples, "cpu", (), ())) is None


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (
            SampleSubset.model_validate({"size": 100}),
            "size = 100 B: 10 samples, each class with one or more, take ",
        ),
        (
            SampleSubset.model_validate({"size": 10**6}),
            "size = 976.6 KiB: all samples take ",
        ),
        (KmeansPrototypes(per_class=500), "per_class = 500: of one class there are "),
    ],
    ids=repr,
)
def test_what_the_samples_cannot_give_is_said(technique: plugins.Technique, message: str) -> None:
    with pytest.raises(plugins.Unsuitable) as error:
        technique.samples(samples.read("digits").train, _context())
    assert str(error.value).startswith(message)


def _no_tokens(count: int) -> Any:
    raise AssertionError


def test_a_model_of_another_shape_or_kind_is_turned_down_with_what_would_fit() -> None:
    workload = TrainClassifier.model_validate({"data": "topics-text"})
    with_samples = dataclasses.replace(_context(), samples=workload.samples())
    with pytest.raises(plugins.Unsuitable) as error:
        workload.start(_CLASSIFIER.build(with_samples), _no_tokens, (), with_samples)
    assert str(error.value) == (
        "samples of topics-text have 512 features and 5 classes, and the model is for 64 and 10: "
        "use classifier-topics-text"
    )
    llama = Llama.of_shape(plugins.Shape(16, 1, 2, 2, 32, 64, 32, True))
    of_llama = dataclasses.replace(with_samples, model=llama)
    with pytest.raises(plugins.Unsuitable) as error:
        workload.start(llama.build(of_llama), _no_tokens, (), of_llama)
    assert str(error.value) == "train-classifier trains the model 'classifier', which takes feature vectors"
    with pytest.raises(plugins.Unsuitable) as error:
        _CLASSIFIER.vocabulary(_CLASSIFIER.skeleton())
    assert str(error.value) == "a classifier takes feature vectors, and no text: use the workload train-classifier"


_STEPS = 300


def _suite(folder: Path, techniques: str, more: str = "") -> Path:
    path = folder / "samples.toml"
    path.write_text(
        f'[suite]\nname = "samples"\n[matrix]\nmodel = ["mlp-0"]\ntechnique = {techniques}\nworkload = ["digits"]\n'
        '[model.mlp-0]\nuse = "classifier-digits"\n[model.mlp-1]\nuse = "classifier-digits"\nseed = 1\n'
        f'[workload.digits]\nuse = "train-classifier"\nsteps = {_STEPS}\n'
        f"[settings]\nmeasured_steps = 3\nthreads = 1\n{more}"
    )
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size = '2 KiB'\nper_class = 3", "size and per_class both say how many samples there are to be: name one"),
        ("size = '11 kb/s'", "'11 kb/s' is no size; write a number and B, KiB, MiB, GiB or TiB"),
        ("per_class = 0", "option 'per_class' = 0: "),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: str, message: str, tmp_path: Path) -> None:
    path = _suite(tmp_path, '["odd"]', f'[technique.odd]\nuse = "sample-subset"\n{options}\n')
    with pytest.raises(SuiteError) as error:
        membench.load_suite(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("samples")
    path = _suite(
        folder,
        '["none", "few", "kmeans-prototypes", "brief-gan", "brief-gan+few", "stream"]',
        '[technique.few]\nuse = "sample-subset"\nsize = 4096\n'
        '[technique.brief-gan]\nuse = "gan"\nsteps = 300\n'
        '[[include]]\nmodel = ["mlp-1"]\ntechnique = ["few"]\nworkload = ["digits"]\n',
    )
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def _record(records: dict[str, Record], technique: str, model: str = "mlp-0") -> Record:
    record = records[f"{model}/{technique}/digits/cpu"]
    assert record.status == "ok", record.message
    return record


def _by_hand(stored: StoredSamples, seed: int) -> float:
    """Accuracy in percent of the same training, written plainly."""
    import torch

    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for batch in itertools.islice(stored.batches(64, seed), _STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(batch[:, :64]), batch[:, 64].long()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    held_out = samples.read("digits").held_out
    with torch.no_grad():
        predicted = module(torch.tensor(held_out.features / 16, dtype=torch.float32)).argmax(1).numpy()
    return 100 * float((predicted == held_out.labels).mean())


@pytest.mark.parametrize(
    ("technique", "model", "seed"), [("none", "mlp-0", 0), ("few", "mlp-0", 0), ("few", "mlp-1", 1)]
)
def test_the_accuracy_is_that_of_the_same_training_by_hand(
    records: dict[str, Record], technique: str, model: str, seed: int
) -> None:
    stored: Any = samples.read("digits").train
    if technique == "few":
        stored = SampleSubset.model_validate({"size": 4096}).samples(stored, _context(seed))
    assert _record(records, technique, model).metrics["accuracy_percent"] == pytest.approx(
        _by_hand(stored, seed), abs=0.5
    )


def test_a_case_says_what_its_samples_take(records: dict[str, Record]) -> None:
    train, _ = samples.read("digits")
    generator = (16 + 10) * 64 + 64 * 64 + 64 * 64 + 4 * (64 + 64 + 64) + 4 * 10
    for technique, size in (("none", train.kept_bytes), ("brief-gan", generator)):
        assert _record(records, technique).metrics["data_bytes"] == size
    for technique in ("few", "kmeans-prototypes"):
        assert 0.9 * 4096 < (_record(records, technique).metrics["data_bytes"] or 0) <= 4096


def test_what_making_the_data_costs_is_in_the_phase_store(records: dict[str, Record]) -> None:
    gan, none = _record(records, "brief-gan").metrics, _record(records, "none").metrics
    assert (gan["store_s"] or 0) > 10 * (none["store_s"] or 0)
    assert (gan["store_peak_live_bytes"] or 0) > (none["store_peak_live_bytes"] or 0)


def test_fewer_or_generated_samples_show_what_they_lose(records: dict[str, Record]) -> None:
    accuracy = {name: _record(records, name).metrics["accuracy_percent"] or 0 for name in ("none", "few", "brief-gan")}
    assert accuracy["none"] > 93
    assert 50 < accuracy["few"] < accuracy["none"]
    assert 30 < accuracy["brief-gan"] < accuracy["none"]


def test_all_steps_of_the_training_are_kept_and_memory_is_that_of_training(records: dict[str, Record]) -> None:
    record = _record(records, "none")
    weights = 4 * (64 * 256 + 256 + 256 * 10 + 10)
    losses = record.processes[0].losses_nats or ()
    assert len(losses) == _STEPS
    assert record.metrics["final_loss_nats"] == losses[-1]
    assert record.metrics["weights_bytes"] == weights
    assert record.metrics["optimizer_state_bytes"] == pytest.approx(2 * weights, rel=0.01)
    assert {"forward_s", "backward_s", "optimizer_s"} <= set(record.metrics)
    assert "tokens_per_s" not in record.metrics


def test_what_does_not_fit_samples_is_skipped_with_the_reason(records: dict[str, Record]) -> None:
    after, of_text = records["mlp-0/brief-gan+few/digits/cpu"], records["mlp-0/stream/digits/cpu"]
    assert (after.status, after.message) == (
        "skipped", "it needs samples that are kept, and a member before it keeps a generator alone",
    )  # fmt: skip
    assert of_text.status == "skipped"
