"""Labelled samples that are generated, or fewer of them: a GAN, and what it has to be better than."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from membench import units
from membench.builtin.models.classifier import seed_of
from membench.data.samples import StoredSamples
from membench.plugins import ByteCount, Context, Samples, Setting, Technique, Unsuitable, Workload

if TYPE_CHECKING:
    import numpy

    from membench.data.samples import Features


_LOOKS = 6


class SampleTechnique(Technique):
    """About labelled samples: it needs a workload that trains on some."""

    acts_on: ClassVar[str] = "data"

    def refuse(self, setting: Setting) -> str | None:
        if type(setting.workload).samples is Workload.samples:
            return "it is about labelled samples, and this workload trains on none: use train-classifier"
        return None


class Gan(SampleTechnique):
    """Samples from the generator of a conditional GAN in int8: trained on the stored ones, it alone is kept.

    A byte a weight, a float16 scale and bias for each output of its three layers. Projection discriminator, spectral
    normalization, hinge loss, noise of 0.03 on what the discriminator sees, averaged generator: the recipe that was
    stable on digits. Its training is in the phase ``store``; each batch of the classifier's is then generated anew,
    within the step.

    Limits: something of the samples is lost, and a plain subset of as many bytes, or prototypes, may keep more of it:
    put ``sample-subset`` and ``kmeans-prototypes`` of the same ``size`` beside it.

    Attributes:
        hidden: width of the generator's two hidden layers; it decides the bytes.
        latent: numbers of noise that a sample is made of.
        steps: of its training.
    """

    hidden: int = Field(64, ge=1, le=65_536)
    latent: int = Field(16, ge=1, le=65_536)
    steps: int = Field(1500, ge=1, le=1_000_000)

    def samples(self, samples: Samples, context: Context) -> Samples:
        from membench.builtin.techniques import gan_training

        steps = 1 if context.rehearsal else self.steps
        return gan_training.trained(_stored(samples), self.latent, self.hidden, steps, seed_of(context), context.device)


class FewerSamples(SampleTechnique):
    """A given number of samples in the place of all: a byte a feature and one for the class, all of it under xz.

    Compressed, so that a generator is held against as much as its bytes can hold of them: of digits three times as many
    as plainly, of hashed text six times.

    Attributes:
        size: bytes that they take at most ('11700 B'), each class with its share of them, and at least one.
        per_class: instead, so many of each class.
    """

    size: Annotated[ByteCount, Field(ge=1)] = 4096
    per_class: int | None = Field(None, ge=1)

    def check(self, setting: Setting) -> str | None:
        both = self.per_class is not None and "size" in self.model_fields_set
        return "size and per_class both say how many samples there are to be: name one of them" if both else None

    def samples(self, samples: Samples, context: Context) -> Samples:
        import numpy

        stored = _stored(samples)
        if self.per_class is not None:
            there = numpy.bincount(stored.labels, minlength=stored.classes).min()
            if self.per_class > there:
                raise Unsuitable(f"per_class = {self.per_class}: of one class there are {there} samples")
            return self._taken(stored, numpy.full(stored.classes, self.per_class), context)
        return self._as_many_as_fit(stored, context)

    def _as_many_as_fit(self, stored: StoredSamples, context: Context) -> StoredSamples:
        """How many there are goes by what fewer or more of them were found to take; a few looks come within a few."""
        fewest, most = stored.classes, len(stored.labels)
        count = min(most, max(fewest, self.size // (stored.width + 1)))
        fitting: StoredSamples | None = None
        seen: set[int] = set()
        while count not in seen and len(seen) < _LOOKS:
            seen.add(count)
            taken = self._taken(stored, shares(stored, count), context)
            if taken.kept_bytes <= self.size and (fitting is None or len(taken.labels) > len(fitting.labels)):
                fitting = taken
            count = min(most, max(fewest, int(count * self.size / taken.kept_bytes)))
        if fitting is None:
            raise Unsuitable(
                f"size = {units.format_bytes(self.size)}: {len(taken.labels)} samples, each class with one or more, "
                f"take {units.format_bytes(taken.kept_bytes)}"
            )
        if len(fitting.labels) == most:
            raise Unsuitable(
                f"size = {units.format_bytes(self.size)}: all samples take {units.format_bytes(fitting.kept_bytes)}"
            )
        return fitting

    def _taken(
        self, stored: StoredSamples, counts: numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]], context: Context
    ) -> StoredSamples:
        """So many samples of each class, kept under xz."""
        import numpy

        chosen = [self.choose(stored.of_class(label), int(count), context) for label, count in enumerate(counts)]
        labels = numpy.repeat(numpy.arange(stored.classes, dtype=numpy.uint8), counts)
        taken = StoredSamples(numpy.concatenate(chosen), labels, stored.classes, stored.largest)
        return taken.unpacked_from_xz()

    def choose(self, features: Features, count: int, context: Context) -> Features:
        """So many samples in the place of all those of a class."""
        raise NotImplementedError


def shares(stored: StoredSamples, count: int) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]:
    """So many samples in all, shared out among the classes as they are there (Sainte-Laguë), at least one each."""
    import numpy

    there = numpy.bincount(stored.labels, minlength=stored.classes)
    counts = numpy.ones(stored.classes, numpy.int64)
    for _ in range(count - stored.classes):
        counts[(there / (counts + 0.5)).argmax()] += 1
    return counts


class KmeansPrototypes(FewerSamples):
    """The centres of k-means clusters of each class in the place of its samples, rounded to a byte a feature.

    Lloyd's algorithm from k-means++ starts, the best of four (scikit-learn's KMeans). What a classifier learns from
    them is what the samples have in common; it is the plain alternative to a generator.
    """

    imports: ClassVar[tuple[str, ...]] = ("torch", "sklearn.cluster")
    needs: ClassVar[dict[str, str]] = {"sklearn": "membench[data]"}

    def choose(self, features: Features, count: int, context: Context) -> Features:
        import numpy
        import sklearn.cluster  # type: ignore[import-untyped]

        starts = 1 if context.rehearsal else 4
        clusters = sklearn.cluster.KMeans(count, n_init=starts, random_state=seed_of(context)).fit(features)
        centres: Features = numpy.rint(clusters.cluster_centers_).astype(numpy.uint8)
        return centres


class SampleSubset(FewerSamples):
    """Some of the samples themselves, drawn at random from each class: real data of a given size, under xz."""

    def choose(self, features: Features, count: int, context: Context) -> Features:
        import numpy

        random = numpy.random.default_rng(seed_of(context))
        chosen: Features = features[random.permutation(len(features))[:count]]
        return chosen


def _stored(samples: Samples) -> StoredSamples:
    if not isinstance(samples, StoredSamples):
        raise Unsuitable("it needs samples that are kept, and a member before it keeps a generator alone")
    return samples
