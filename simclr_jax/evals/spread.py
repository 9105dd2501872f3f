"""How h and z of training images are spread: a hook of the training loop, for what a step cannot afford."""

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.assemble import Pretraining
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.split import BROKEN
from simclr_jax.data.subsets import evenly
from simclr_jax.evals import subjects
from simclr_jax.evals.nearest import unit
from simclr_jax.training.state import TrainState

# At most this many images: evenly spaced, or the first ones of a stream. RankMe cannot exceed it.
_IMAGES = 2048


def rank_of(features: np.ndarray) -> float:
    """Computes RankMe of features [n, D] (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the
    shares of the singular values; from 1 to min(n, D). Compare it with earlier values of one run only: no
    value by itself is good or bad.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-12) + 1e-7
    return float(np.exp(-np.sum(shares * np.log(shares))))


def uniformity_of(z: np.ndarray) -> float:
    """Normalises z [n, D], and computes ln of the mean of exp(-2 |z_i - z_k|^2) over pairs of different rows
    (Wang and Isola 2020, arXiv 2005.10242): 0 where all are one point; at best about -4 + 8 / D.
    """
    z = unit(z)
    near = np.exp(-4.0 + 4.0 * (z @ z.T).astype(np.float64))
    np.fill_diagonal(near, 0.0)
    return float(np.log(near.sum() / (len(z) * (len(z) - 1))))


class Spread:
    """Measures every so many steps how h and z of some training images are spread.

    Attributes:
      name: "spread".
      memory: None.
    """

    name, memory = "spread", None

    def __init__(self, config: ConfigDict, made: Pretraining):
        """Compiles nothing yet.

        Args:
          config: the run's configuration, with health.every_steps above 0.
          made: the assembled run.
        """
        self._every, mesh = config.health.every_steps, made.job.mesh
        some = made.train
        if isinstance(some, IndexedSplit) and some.count > _IMAGES:
            some = some.subset(evenly(some.count, _IMAGES))
        self._images = assemble.images_of(config, some, whole=made.train)
        self._views = assemble.views(config, mesh)
        represent = subjects.representations(config, with_z=True)
        self._extractor = subjects.extractor(config, mesh, represent)

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def run(self, step: int, state: TrainState) -> dict[str, float]:
        """Returns {"rank_h", "rank_z", "uniformity"} of evaluation views; {} if fewer than two images can be read."""
        variables = state.variables("encoder"), state.variables("head")
        batches = self._views.evaluation_batches(self._images, self._extractor.batch_size)
        stream = self._extractor.stream(variables, batches, min(_IMAGES, self._images.split.count))
        # What stands in for an image that cannot be read is no image.
        rows = [
            {name: x[labels != BROKEN] for name, x in found.items()} for found, labels in stream
        ]
        h, z = (np.concatenate([row[name] for row in rows]) for name in ("h", "z"))
        if len(h) < 2:
            return {}
        return {"rank_h": rank_of(h), "rank_z": rank_of(z), "uniformity": uniformity_of(z)}
