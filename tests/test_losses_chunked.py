"""NT-Xent in tiles: equal to the dense loss, which test_losses.py holds against Algorithm 1."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import algorithm_1, random_pairs

from simclr_jax.losses import nt_xent
from simclr_jax.losses_chunked import nt_xent_chunked
from simclr_jax.mesh import batch_sharded, make_mesh


def both(loss, z):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(z)


# 2B = 64: tiles that divide it, that do not, the whole, and larger than the whole.
@pytest.mark.parametrize("chunk", [2, 16, 24, 64, 1024])
@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_value_metrics_and_gradient_are_the_dense_ones(chunk, tau, devices):
    z = random_pairs(pairs=32)
    mesh = make_mesh(devices, fsdp=min(2, len(devices)))
    (loss, metrics), gradient = both(
        lambda z: nt_xent_chunked(z, tau, chunk=chunk, mesh=mesh),
        jax.device_put(z, batch_sharded(mesh)),
    )
    (dense_loss, dense_metrics), dense_gradient = both(lambda z: nt_xent(z, tau), z)
    # A cosine is off by some 1e-7, so a logit by 1e-7 / tau.
    tolerance = max(1e-5, 1e-6 / tau)
    np.testing.assert_allclose(loss, dense_loss, rtol=tolerance)
    np.testing.assert_allclose(loss, algorithm_1(z, tau)[0], rtol=tolerance)
    np.testing.assert_allclose(
        gradient, dense_gradient, atol=tolerance * np.abs(dense_gradient).max()
    )
    assert metrics.keys() == dense_metrics.keys()
    for name, value in dense_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, atol=1e-6, err_msg=name)


def test_the_cotangent_scales_the_gradient():
    z = jnp.asarray(random_pairs())
    once, thrice = (jax.grad(lambda z, k=k: k * nt_xent_chunked(z, 0.1)[0])(z) for k in (1.0, 3.0))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5, atol=1e-7)


def test_the_metrics_have_no_gradient():
    z = jnp.asarray(random_pairs())
    gradient = jax.grad(lambda z: nt_xent_chunked(z, 0.1)[1]["contrastive_entropy"])(z)
    assert not np.any(gradient)


def test_collapsed_projections_score_zero_not_one():
    """Equal similarities are equal to the last bit in every tile, and a tie counts against."""
    z = jnp.broadcast_to(jnp.asarray(random_pairs(pairs=1, width=128)[:1]), (32, 128))
    _, metrics = nt_xent_chunked(z, 0.1, chunk=12)
    assert metrics["contrastive_top1"] == 0
    assert metrics["contrastive_top5"] == 0


def test_an_odd_tile_is_refused():
    with pytest.raises(ValueError, match="chunk=3: expected an even number"):
        nt_xent_chunked(jnp.ones((8, 4)), 0.1, chunk=3)


PROGRAM = """
import json, pathlib, re
import jax, jax.numpy as jnp
from simclr_jax.losses_chunked import nt_xent_chunked

z = jax.random.normal(jax.random.key(0), (2 * 32768, 128))
(loss, _), gradient = jax.jit(jax.value_and_grad(lambda z: nt_xent_chunked(z, 0.1), has_aux=True))(z)
# Not getrusage: on Linux its maximum begins at that of the process that started this one.
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
print(json.dumps({"loss": float(loss), "norm": float(jnp.linalg.norm(gradient)), "peak": peak}))
"""


def test_32768_images_take_less_than_a_gigabyte_and_a_half():
    """Peak resident memory of a process of its own; the similarities alone would be 17 GB."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True
    )
    result = json.loads(process.stdout)
    assert result["peak"] < 1.5e9
    # Random directions: 65535 candidates, cosines of variance 1 / 128, so logits of 100 / 128.
    np.testing.assert_allclose(result["loss"], np.log(65535) + 100 / 128 / 2, rtol=0.01)
    assert 0 < result["norm"] < 1
