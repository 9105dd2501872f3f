"""How many images a second the host makes views of."""

import contextlib
import time

from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh


def measure_input(config: ConfigDict, seconds: float) -> list[dict]:
    """Measures how many images a second this process makes into batches, with nothing else to do.

    Args:
      config: a run's configuration.
      seconds: time to measure for, s.

    Returns:
      one row: images_per_second, views_per_second, seconds_to_first_batch.

    Raises:
      UserError: the device makes the views, so that there is nothing to measure.
    """
    if config.data.placement == "device":
        raise UserError(
            "data.placement=device: the host makes no views, so that there is nothing to measure; see bench step and e2e"
        )
    train = assemble.data_set(config).train
    images = assemble.images_of(config, train)
    began = time.perf_counter()
    with contextlib.closing(assemble.views(config, make_mesh()).batches(images, 0)) as batches:
        next(batches)
        first = time.perf_counter() - began
        for _ in range(2):  # discard batches prefetched before the clock starts
            next(batches)
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            count += len(next(batches)["index"])
    return [
        {
            "of": "input",
            "images_per_second": count / elapsed,
            "views_per_second": 2 * count / elapsed,
            "seconds_to_first_batch": first,
        }
    ]
