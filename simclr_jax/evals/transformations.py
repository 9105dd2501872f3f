"""Measures what h and z know of a transformation that an image went through (paper, section 4.2 and Table 3).

Each image is transformed or not, at random, and a small network is trained to tell from its features which it
was. The four tasks are the paper's. It publishes neither the network's size nor the strength of the corruption;
we take one hidden layer of 512, and Gaussian noise of deviation 0.1.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import Progress, say
from simclr_jax.data.order import Share
from simclr_jax.data.split import BROKEN
from simclr_jax.errors import UserError, one_line
from simclr_jax.evals import subjects
from simclr_jax.mesh import make_mesh
from simclr_jax.views.color import Grey
from simclr_jax.views.sobel import Sobel

_HIDDEN, _NOISE = 512, 0.1


class Task(NamedTuple):
    """A question about an image.

    Attributes:
      shares: how often each answer is right.
      apply: (image float64 [H, W, 3] in [0, 1], answer, generator) -> the image that the answer is about.
    """

    shares: tuple[float, ...]
    apply: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _by_channels(operation: Any) -> Callable[[np.ndarray, int, np.random.Generator], np.ndarray]:
    """Returns what applies an operation of the views where the answer is 1."""

    def apply(image: np.ndarray, answer: int, rng: np.random.Generator) -> np.ndarray:
        del rng
        if not answer:
            return image
        return np.stack(operation.formula(np, tuple(np.moveaxis(image, -1, 0))), axis=-1)

    return apply


def _noisy(image: np.ndarray, answer: int, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + answer * rng.normal(scale=_NOISE, size=image.shape), 0.0, 1.0)


def _rotated(image: np.ndarray, answer: int, rng: np.random.Generator) -> np.ndarray:
    del rng
    return np.rot90(image, answer)


TASKS = {
    "colour or grey": Task((0.8, 0.2), _by_channels(Grey())),
    "rotation": Task((0.25,) * 4, _rotated),
    "original or noisy": Task((0.5, 0.5), _noisy),
    "original or Sobel": Task((0.5, 0.5), _by_channels(Sobel())),
}


def what_is_known(config: ConfigDict, workdir: str) -> list[dict]:
    """Trains a probe for each task on h and on z of the newest encoder of a workdir.

    Returns:
      rows {"task", "features": "h" or "z", "accuracy" on the test images, "chance"}.

    Raises:
      UserError: there is no labelled test split, or no checkpoint with a projection head.
    """
    data, mesh = subjects.labelled(config), make_mesh()
    trained = subjects.trained(config, workdir, mesh, head=True)
    extractor = subjects.extractor(config, mesh, subjects.representations(config, with_z=True))
    batch_size = extractor.batch_size
    views = assemble.views(config, mesh)
    variables = trained.encoder, trained.head

    assert data.test is not None
    # Made once: they remember which images cannot be read.
    parts = [assemble.images_of(config, split) for split in (data.train, data.test)]

    def features(task: Task, part: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        images, count = parts[part], parts[part].split.count
        batches = views.evaluation_batches(images, batch_size)
        batches = asked(task, batches, views.settings.order.share, config.seed, part)
        with Progress(-(-count // batch_size)) as progress:
            return extractor.extract(variables, progress.track(batches), count)

    rows = []
    for name, task in TASKS.items():
        say(f"{name}: features of {data.train.count} and {data.test.count} images")
        train, answers = features(task, 0)
        test, expected = features(task, 1)
        for kind in ("h", "z"):
            accuracy = probe(train[kind], answers, test[kind], expected, config.seed)
            about = {"task": name, "features": kind, "chance": max(task.shares)}
            rows.append(about | {"accuracy": accuracy})
    return rows


def asked(
    task: Task, batches: Iterator[dict[str, np.ndarray]], share: Share, seed: int, part: int
) -> Iterator[dict[str, np.ndarray]]:
    """Transforms images, and yields them with the answers in place of their labels.

    An image's answer and noise are functions of the seed, the part and its place in the split, whatever the
    batches and processes are.

    Args:
      task: the question, such as by how much the image was rotated.
      batches: this process's, {"image": uint8 [n, S, S, 3], "label": [n]}.
      share: which images of the split these are: every `share.count`-th from the `share.index`-th on.
      seed, part: decide the random numbers: each part of the data has its own.
    """
    place = share.index
    for batch in batches:
        images, answers = [], []
        for image, label in zip(batch["image"], batch["label"], strict=True):
            rng = np.random.default_rng((seed, part, place))
            answer = int(rng.choice(len(task.shares), p=task.shares))
            changed = task.apply(image / 255.0, answer, rng)
            images.append(np.round(255.0 * changed).astype(np.uint8))
            answers.append(BROKEN if label == BROKEN else answer)
            place += share.count
        yield {"image": np.stack(images), "label": np.asarray(answers, np.int32)}


def probe(
    train: np.ndarray, answers: np.ndarray, test: np.ndarray, expected: np.ndarray, seed: int
) -> float:
    """Trains scikit-learn's network with one hidden layer, stopped by a tenth of the training images.

    Args:
      train, answers: features [n, D] and int [n].
      test, expected: features and answers of the test images.
      seed: decides its first weights and its batches.

    Returns:
      the accuracy on the test images.

    Raises:
      UserError: the features are not finite, or too few to hold out a tenth of them.
    """
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPClassifier(_HIDDEN, early_stopping=True, max_iter=100, random_state=seed)
    try:
        fitted = make_pipeline(StandardScaler(), network).fit(train, answers)
    except ValueError as error:
        raise UserError(
            f"no probe can be fitted to the features of {len(answers)} images: {one_line(error)}"
        ) from error
    return float(fitted.score(test, expected))
