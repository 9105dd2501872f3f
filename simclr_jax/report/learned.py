"""What an encoder makes of images: neighbours, a map, the most isolated, the most alike, confusions."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr_jax.pretrained import Encoder
from simclr_jax.report.pictures import Picture

_THUMBNAIL = 72  # pixels
_BATCH = 256
_NEIGHBOURS = 10  # whose mean similarity says how isolated an image is


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A sample of images and their representations.

    Attributes:
      h: float32 [n, D], of length 1 each.
      features: float32 [n, D], h as the encoder gives it.
      thumbnails: uint8 [h, w, 3] each, at most 72 px a side.
      indices: their places in the split [n].
      labels: int [n]; -1: none.
    """

    h: np.ndarray
    features: np.ndarray
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


def embed_pictures(encoder: Encoder, pictures: Iterable[Picture]) -> Embedded:
    """Embeds images, holding 256 of them at a time."""
    features, thumbnails, indices, labels = [], [], [], []
    waiting = iter(pictures)
    while some := list(itertools.islice(waiting, _BATCH)):
        colour = [np.broadcast_to(p.image, (*p.image.shape[:2], 3)) for p in some]
        features.append(encoder(np.stack([encoder.preprocess(image) for image in colour])))
        thumbnails += [_thumbnail(image) for image in colour]
        indices += [picture.place for picture in some]
        labels += [picture.label for picture in some]
    h = np.concatenate(features) if features else np.zeros((0, encoder.width), np.float32)
    unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    return Embedded(unit, h, thumbnails, np.asarray(indices), np.asarray(labels))


def _thumbnail(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def nearest(embedded: Embedded) -> Near:
    """Finds the 10 images nearest to each, or all others where there are fewer."""
    h = embedded.h
    k = min(_NEIGHBOURS, len(h) - 1)
    indices, similarities = np.zeros((len(h), k), int), np.zeros((len(h), k), np.float32)
    for start in range(0, len(h), _BATCH):
        similar = h[start : start + _BATCH] @ h.T
        own = np.arange(len(similar))
        similar[own, start + own] = -np.inf
        order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        indices[start : start + _BATCH] = order
        similarities[start : start + _BATCH] = np.take_along_axis(similar, order, axis=1)
    return Near(indices, similarities)


def most_isolated(near: Near, count: int) -> np.ndarray:
    """Returns the `count` images whose nearest ones are the least similar, the most isolated first."""
    return np.argsort(near.similarities.mean(axis=1), kind="stable")[:count]


def most_alike(near: Near, count: int) -> list[tuple[int, int, float]]:
    """Returns the `count` most similar pairs (first, second, cosine), each pair once."""
    pairs = {}
    for i, (row, similar) in enumerate(zip(near.indices, near.similarities, strict=True)):
        for j, cosine in zip(row.tolist(), similar.tolist(), strict=True):
            pairs[min(i, j), max(i, j)] = cosine
    best = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:count]
    return [(i, j, cosine) for (i, j), cosine in best]


def map_of(h: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lays images out in a plane [n, 2] so that similar ones lie together: t-SNE (van der Maaten and Hinton
    2008) by scikit-learn, from the two largest principal components, so that it is the same each time.
    """
    from sklearn.manifold import TSNE

    if len(h) < 5:
        return np.zeros((len(h), 2), np.float32)
    perplexity = min(30.0, (len(h) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(h)


def confusions(train: Embedded, test: Embedded, classes: int) -> np.ndarray:
    """Counts [classes, classes], true class by row, what a linear classifier of the training images' features
    takes the test images for.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, asked = train.labels >= 0, test.labels >= 0
    counts = np.zeros((classes, classes), int)
    if not asked.any() or len(np.unique(train.labels[known])) < 2:
        return counts
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    classifier.fit(train.features[known], train.labels[known])
    said = classifier.predict(test.features[asked])
    np.add.at(counts, (test.labels[asked], said), 1)
    return counts


def most_confused(counts: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Returns up to `count` (true class, taken for, times), the most frequent first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [tuple(int(x) for x in np.unravel_index(place, wrong.shape)) for place in order]
    return [(i, j, int(wrong[i, j])) for i, j in pairs if wrong[i, j]]
