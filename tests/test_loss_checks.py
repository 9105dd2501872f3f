"""A loss of one's own that breaks the contract is refused in one line before the run begins."""

import jax.numpy as jnp
import pytest

from simclr_jax import config
from simclr_jax.errors import UserError
from simclr_jax.losses import LOSSES
from simclr_jax.losses.checks import check_kind, check_loss
from simclr_jax.losses.contract import Loss
from simclr_jax.mesh import make_mesh


def mean_square(z, labels):
    return jnp.mean(z**2), {"size": jnp.mean(jnp.abs(z))}


def check(apply):
    check_loss("mine", Loss(apply, "mine"), images=4, width=3)


def test_what_the_contract_says_passes():
    check(mean_square)
    check(lambda z, labels: (jnp.mean(z**2), {}))
    check(lambda z, labels: (jnp.mean(z**2), {"a_number": 1.0}))


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (lambda z, y: jnp.mean(z), r"returns float32\[\]: expected \(float32 scalar, \{name"),
        (lambda z, y: (jnp.sum(z, axis=1), {}), r"the loss is float32\[8\]: expected"),
        (lambda z, y: (jnp.mean(z), {"parts": z[0]}), r"parts is float32\[3\]: expected"),
        (lambda z, y: (jnp.argmax(z), {}), r"the loss is int32\[\]: expected"),
        (
            lambda z, y: (jnp.mean(z), {"z_std": 1.0, "loss": 2.0}),
            "reports loss, z_std, which every",
        ),
        (lambda z, y: (jnp.float32(3.0), {}), "has no gradient: its value does not change with z"),
        (
            lambda z, y: (jnp.mean(z @ z), {}),
            r"\(.*test_loss_checks\.py, line \d+\) fails on z \[8, 3\] and labels \[4\]: TypeError: ",
        ),
    ],
)
def test_what_breaks_it_is_named(apply, says):
    with pytest.raises(UserError, match=f"loss.name=mine.*{says}") as caught:
        check(apply)
    assert "\n" not in str(caught.value)


def test_a_builder_that_returns_a_function_is_refused():
    with pytest.raises(
        UserError, match=r"loss\.name=mine: its builder returned <function .*expected a"
    ):
        check_kind("mine", mean_square)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_package_passes(name):
    made = LOSSES[name](config.default().loss.to_dict(), make_mesh(), 8)
    check_loss(name, check_kind(name, made), images=8, width=4)
