"""A loss of one's own that breaks the contract is refused in one line before the run begins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from simclr_jax import config
from simclr_jax.errors import UserError
from simclr_jax.evals import EVALUATIONS
from simclr_jax.losses import LOSSES
from simclr_jax.losses.checks import TAKEN, check_kind, check_loss, has_gradient
from simclr_jax.losses.contract import Loss
from simclr_jax.mesh import make_mesh


def mean_square(z, labels):
    return jnp.mean(z**2), {"size": jnp.mean(jnp.abs(z))}


def callback(z, labels):
    """Has a value and no gradient."""
    return jax.pure_callback(np.mean, jax.ShapeDtypeStruct((), jnp.float32), z), {}


def check(apply):
    check_loss("mine", Loss(apply, "mine"), images=4, width=3, mesh=make_mesh())


def test_what_the_contract_says_passes():
    check(mean_square)
    check(lambda z, labels: (jnp.mean(z**2), {}))
    check(lambda z, labels: (jnp.mean(z**2), {"a_number": 1.0, "a_count": jnp.int32(3)}))
    check(jax.jit(mean_square))
    check(functools.partial(lambda scale, z, labels: (jnp.mean(scale * z**2), {}), 2.0))
    axes = lambda z: P(*jax.sharding.get_abstract_mesh().axis_names[:1])  # noqa: E731
    check(lambda z, labels: (jnp.mean(jax.lax.with_sharding_constraint(z, axes(z))), {}))


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
        (lambda z, y: (jnp.mean(z), {"step": 1.0}), "reports step, which every"),
        (callback, r"fails on z \[8, 3\] and labels \[4\]: ValueError: Pure callbacks do not"),
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


def test_names_that_evaluations_report_are_taken():
    assert {evaluation.metric for evaluation in EVALUATIONS.values() if evaluation.metric} <= set(
        TAKEN
    )


def test_a_builder_that_returns_a_function_is_refused():
    with pytest.raises(
        UserError, match=r"loss\.name=mine: its builder returned <function .*expected a"
    ):
        check_kind("mine", mean_square)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_package_passes(name):
    made = LOSSES[name](config.default().loss.to_dict(), make_mesh(), 8)
    loss = check_kind(name, made)
    check_loss(name, loss, images=8, width=4, mesh=make_mesh())
    assert has_gradient(loss, 8, 4, make_mesh())


def test_a_loss_that_does_not_change_with_z_is_told_from_others():
    constant = Loss(lambda z, labels: (jnp.float32(3.0), {}), "constant")
    assert not has_gradient(constant, 4, 3, make_mesh())
    assert has_gradient(Loss(mean_square, "mean square"), 4, 3, make_mesh())
    assert has_gradient(constant, 1025, 3, make_mesh())  # not looked at
