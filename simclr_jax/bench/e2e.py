"""How fast a whole run is, and how long it waits for images."""

import contextlib
import time

import jax
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.views.placement import stream


def measure_e2e(config: ConfigDict, seconds: float) -> list[dict]:
    """Measures a run's batches and steps together, without what it writes.

    Args:
      config: the run's configuration.
      seconds: time to measure for, s.

    Returns:
      one row: images_per_second, views_per_second_per_device, share_waiting_for_input,
      seconds_to_first_step, steps.
    """
    began = time.perf_counter()
    made = assemble.pretraining(config)
    job, images = made.job, assemble.images_of(config, made.train)
    state = job.init()
    with contextlib.closing(stream(made.views, images)(0)) as batches:
        state, metrics = job.step(state, next(batches)[0])
        jax.block_until_ready(metrics)
        first = time.perf_counter() - began
        steps, waited, pending = 0, 0.0, metrics
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            asked = time.perf_counter()
            batch, _ = next(batches)
            waited += time.perf_counter() - asked
            state, metrics = job.step(state, batch)
            jax.block_until_ready(pending)  # one step ahead, as the loop of a run is
            pending = metrics
            steps += 1
        jax.block_until_ready(state)
        elapsed = time.perf_counter() - began
    rate = steps * config.data.batch_size / elapsed
    return [
        {
            "of": "whole run",
            "images_per_second": rate,
            "views_per_second_per_device": 2 * rate / job.mesh.size,
            "share_waiting_for_input": waited / elapsed,
            "seconds_to_first_step": first,
            "steps": steps,
        }
    ]
