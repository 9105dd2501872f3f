"""How long NT-Xent takes, and how much memory, by the number of pairs."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from simclr_jax.losses import nt_xent, nt_xent_chunked

_LOSS_PAIRS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_LOSS_WIDTH = 128
_DENSE_MOST_PAIRS = 8192  # of the dense loss: 1 GB of similarities, of which some copies are held


def measure_loss(seconds: float) -> list[dict]:
    """Measures NT-Xent forward and backward on one device, dense and in tiles, in turns.

    Args:
      seconds: time for all sizes together.

    Returns:
      a row for each number of pairs and implementation: seconds of one forward and backward pass (the
      median), temporary_bytes that the compiler plans.
    """
    rows = []
    for pairs in _LOSS_PAIRS:
        z = jax.random.normal(jax.random.key(0), (2 * pairs, _LOSS_WIDTH))
        losses: dict[str, Callable] = {"chunked": nt_xent_chunked}
        if pairs <= _DENSE_MOST_PAIRS:
            losses["dense"] = nt_xent
        programs: dict[str, Any] = {}
        for name, loss in losses.items():
            gradient = jax.jit(jax.value_and_grad(lambda z, loss=loss: loss(z, 0.1), has_aux=True))
            programs[name] = gradient.lower(z).compile()
            jax.block_until_ready(programs[name](z))
        times: dict = {name: [] for name in programs}
        began = time.perf_counter()
        while time.perf_counter() - began < seconds / len(_LOSS_PAIRS) or len(times["chunked"]) < 3:
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(z))
                times[name].append(time.perf_counter() - start)
        rows += [
            {
                "of": f"NT-Xent, {name}",
                "pairs": pairs,
                "seconds": float(np.median(times[name])),
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            }
            for name, program in programs.items()
        ]
    return rows
