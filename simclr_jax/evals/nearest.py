"""Finds the images nearest to some, by the cosine similarity of their features."""

from collections.abc import Callable, Iterable

import jax
import numpy as np


def unit(h: np.ndarray) -> np.ndarray:
    """Scales each row of h [n, D] to length 1; zeros stay."""
    return h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)


def nearest(
    blocks: Callable[[], Iterable[np.ndarray]], queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k images of largest cosine similarity to each query, without itself.

    Args:
      blocks: () -> the features of all images in order, float32 [n, D] each time; called twice.
      queries: indices [q].
      k: at most the number of images less one.

    Returns:
      indices [q, k] and similarities [q, k], the largest first; of equal ones the first in order.
    """
    asked: dict[int, np.ndarray] = {}
    start = 0
    for block in blocks():
        asked |= {i: block[i - start] for i in queries.tolist() if start <= i < start + len(block)}
        start += len(block)
    wanted = unit(np.stack([asked[i] for i in queries.tolist()]))
    best = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    start = 0
    for block in blocks():
        indices = np.arange(start, start + len(block))
        similar = wanted @ unit(block).T
        similar[queries[:, None] == indices] = -np.inf
        best = np.concatenate([best, np.broadcast_to(indices, similar.shape)], axis=1)
        scores = np.concatenate([scores, similar], axis=1)
        found = jax.lax.top_k(scores, min(k, scores.shape[1]))
        scores, order = (np.asarray(x) for x in found)
        best = np.take_along_axis(best, order, axis=1)
        start += len(block)
    return best, scores
