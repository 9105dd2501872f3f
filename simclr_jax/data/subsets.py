"""Which images of a split are taken: some for validation, some labels, some to look at. The same ones each time."""

from collections.abc import Callable

import numpy as np

from simclr_jax.errors import UserError


def evenly(total: int, count: int) -> np.ndarray:
    """Returns at most `count` of the indices 0 to total - 1, evenly spaced."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def split_validation(
    count: int,
    fraction: float,
    seed: int,
    name: str = "image",
    among: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Divides `count` images by a shuffle that depends on the seed only.

    Args:
      count: images.
      fraction: share of the images that is put into the validation part, at least one image.
      seed: decides the shuffle.
      name: the word for one of them, in an error.
      among: bool [count], the images of which a share is put into the validation part; None: all. One shuffle of all
        images decides, so that the parts of larger fractions, and of more images, hold most of those of smaller ones.

    Returns:
      indices of the training part and of the validation part, ascending.

    Raises:
      UserError: the training part would be empty.
    """
    order = np.random.default_rng([seed, 0]).permutation(count)
    eligible = order if among is None else order[among[order]]
    held = max(1, round(fraction * len(eligible)))
    if held >= len(eligible):
        raise UserError(
            f"{len(eligible)} {name}{'s' * (len(eligible) != 1)}, of which a share of {fraction:g} held out leaves none to "
            f"train on: expected more {name}s, or a smaller data.test_fraction or eval.validation_fraction"
        )
    is_held = np.zeros(count, bool)
    is_held[eligible[:held]] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def few_labels(y: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Draws `per_class` images of each class, or all of a class that has fewer.

    Args:
      y: labels int [n]; an image with a negative one has no label and is never drawn.
      per_class: images of each class.
      seed: decides the draw.

    Returns:
      their indices, class by class, in the order in which the classes first occur: another numbering of
      the classes draws the same images.
    """
    return _draw_of_each_class(y, lambda _: per_class, seed)


def share_of_labels(y: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a fraction of each class's images, rounded, at least one; see `few_labels`."""
    return _draw_of_each_class(y, lambda count: max(1, round(fraction * count)), seed)


def _draw_of_each_class(y: np.ndarray, how_many: Callable[[int], int], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    places = np.flatnonzero(y >= 0)
    _, first = np.unique(y[places], return_index=True)
    drawn = []
    for label in y[places[np.sort(first)]]:
        members = np.flatnonzero(y == label)
        drawn.append(rng.permutation(members)[: how_many(len(members))])
    return np.concatenate(drawn)
