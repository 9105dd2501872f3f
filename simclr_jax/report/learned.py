"""Finds what an encoder makes of images: neighbours, a map, the most isolated, the most alike, confusions."""

import dataclasses
import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr_jax.data.pictures import Picture, pictures_of
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.split import Split
from simclr_jax.evals.nearest import nearest
from simclr_jax.pretrained import Encoder

_THUMBNAIL = 72  # pixels
_BATCH = 256
_NEIGHBOURS = 10  # whose mean similarity says how isolated an image is


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A sample of images and their representations.

    Attributes:
      h: float32 [n, D], as the encoder gives it.
      thumbnails: uint8 [h, w, 3] each, at most 72 px a side.
      indices: their places in the split [n].
      labels: int [n]; -1: none.
    """

    h: np.ndarray
    thumbnails: list[np.ndarray]
    indices: np.ndarray
    labels: np.ndarray


class Near(NamedTuple):
    """Images and their nearest ones.

    Attributes:
      indices: int [n, k], by similarity, the largest first; none is the image itself.
      similarities: cosines [n, k].
    """

    indices: np.ndarray
    similarities: np.ndarray


class Prepared(NamedTuple):
    """Holds the parts of an image that are kept after it is read.

    Attributes:
      view: uint8 [S, S, 3], what the encoder sees.
      thumbnail: uint8 [h, w, 3].
      place: its index in the split.
      label: index into the classes; -1: none.
    """

    view: np.ndarray
    thumbnail: np.ndarray
    place: int
    label: int


def embed_sample(encoder: Encoder, split: Split, count: int, options: ReadOptions) -> Embedded:
    """Embeds a sample of a split; see `pictures_of`. Holds 256 views, and a thumbnail of each image."""

    def prepared(picture: Picture) -> Prepared:
        colour = np.broadcast_to(picture.image, (*picture.image.shape[:2], 3))
        view = encoder.preprocess(colour)
        return Prepared(view, _thumbnail(colour), picture.place, picture.label)

    waiting = pictures_of(split, count, options, prepared)
    parts, thumbnails, places, labels = [], [], [], []
    while some := list(itertools.islice(waiting, _BATCH)):
        parts.append(encoder(np.stack([one.view for one in some])))
        thumbnails += [one.thumbnail for one in some]
        places += [one.place for one in some]
        labels += [one.label for one in some]
    h = np.concatenate(parts) if parts else np.zeros((0, encoder.width), np.float32)
    return Embedded(h, thumbnails, np.asarray(places), np.asarray(labels))


def _thumbnail(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def nearest_of_each(embedded: Embedded) -> Near:
    """Finds the 10 images nearest to each, or all others where there are fewer."""
    count = len(embedded.h)
    k = min(_NEIGHBOURS, count - 1)
    found = [
        nearest(lambda: [embedded.h], np.arange(start, min(start + _BATCH, count)), k)
        for start in range(0, count, _BATCH)
    ]
    return Near(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def most_isolated(near: Near, count: int) -> np.ndarray:
    """Returns the `count` images whose nearest ones are the least similar, the most isolated first."""
    return np.argsort(near.similarities.mean(axis=1), kind="stable")[:count]


def most_alike(near: Near, count: int) -> list[tuple[int, int, float]]:
    """Returns the `count` most similar pairs (first, second, cosine). Takes pairs from the most
    similar on, and leaves out one whose images are already in another pair: the many pairs of one group of copies
    would hide the remaining pairs.
    """
    pairs = {}
    for i, (row, similar) in enumerate(zip(near.indices, near.similarities, strict=True)):
        for j, cosine in zip(row.tolist(), similar.tolist(), strict=True):
            pairs[min(i, j), max(i, j)] = cosine
    found: list[tuple[int, int, float]] = []
    taken: set[int] = set()
    for (i, j), cosine in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        if len(found) == count:
            break
        if not {i, j} & taken:
            taken |= {i, j}
            found.append((i, j, cosine))
    return found


def map_of(h: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lays out five or more representations h [n, D] in a plane [n, 2], similar ones together, by scikit-learn's t-SNE
    (van der Maaten and Hinton 2008). Starts from the two largest principal components: the same map each time.
    """
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(h) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(h)


def confusions(train: Embedded, test: Embedded) -> Counter[tuple[int, int]]:
    """Counts (true class, predicted class) over the test images, by a linear classifier fitted to the training
    images' h. Images without a label are left out. The result is empty if fewer than two training classes
    or no test images are left.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, asked = train.labels >= 0, test.labels >= 0
    if not asked.any() or len(np.unique(train.labels[known])) < 2:
        return Counter()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    classifier.fit(train.h[known], train.labels[known])
    said = classifier.predict(test.h[asked])
    return Counter(zip(test.labels[asked].tolist(), said.tolist(), strict=True))


def most_confused(counts: Counter[tuple[int, int]], count: int) -> list[tuple[int, int, int]]:
    """Returns up to `count` (true class, taken for, times), the most frequent first."""
    wrong = [(i, j, n) for (i, j), n in counts.items() if i != j]
    return sorted(wrong, key=lambda one: (-one[2], one[:2]))[:count]
