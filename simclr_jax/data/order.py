"""Which image comes when: a function of (seed, epoch, position) and nothing else."""

from collections.abc import Iterator

import numpy as np


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one epoch: a permutation [count] of image indices, new for each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def split_validation(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training part and of the validation part of labels y [n], by a fixed shuffle."""
    order = np.random.default_rng([seed, 0]).permutation(len(y))
    held = max(1, round(fraction * len(y)))
    return np.sort(order[held:]), np.sort(order[:held])


def few_labels(y: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` images of each class of y [n], or as many as the class has."""
    rng = np.random.default_rng([seed, 1])
    labelled = np.unique(y[y >= 0])
    return np.concatenate([rng.permutation(np.flatnonzero(y == c))[:per_class] for c in labelled])


def batch_positions(
    seed: int, count: int, batch_size: int, start_step: int, rows: slice
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (epoch, index) [rows] of every global batch from `start_step` on, without end.

    The epochs follow each other without a gap: step s holds the positions s * B to (s + 1) * B of
    the concatenated epochs, so that no image is left out and B may exceed `count`.

    Args:
      seed: of the run.
      count: images of the data set.
      batch_size: B, of the global batch.
      start_step: the first step to yield; nothing before it is computed.
      rows: the part of each global batch that this process takes.
    """
    orders: dict[int, np.ndarray] = {}
    step = start_step
    while True:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        epochs = positions // count
        needed = range(epochs[0], epochs[-1] + 1)
        orders = {e: orders[e] if e in orders else epoch_order(seed, e, count) for e in needed}
        indices = np.empty_like(positions)
        for epoch, order in orders.items():
            here = epochs == epoch
            indices[here] = order[positions[here] % count]
        yield epochs, indices
        step += 1
