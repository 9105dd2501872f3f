"""Checks a loss against its contract before a run begins: a loss of one's own may be wrong in many ways."""

import inspect
import traceback
from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax.errors import UserError, one_line
from simclr_jax.losses.contract import Loss
from simclr_jax.losses.health import spread_of

# What the step reports itself.
_TAKEN = ("loss", "grad_norm", "update_norm", "learning_rate", "skipped_steps")
_EXPECTED = "expected (float32 scalar, {name: float32 scalar}), see losses.contract.Loss"
# Similarities of so many rows are computed in a moment; larger batches are checked for their shapes alone.
_ROWS = 2048


def check_kind(name: str, made: Any) -> Loss:
    """Returns what the builder of loss `name` made. Raises a UserError if that is no `Loss`."""
    if isinstance(made, Loss):
        return made
    raise UserError(
        f"loss.name={name}: its builder returned {made!r}: expected a losses.contract.Loss"
    )


def check_loss(name: str, loss: Loss, images: int, width: int) -> None:
    """Raises a UserError unless `loss.apply` gives a loss, numbers under names that are free, and a gradient.

    Args:
      name: the option loss.name.
      loss: what its builder made.
      images: B, of the global batch.
      width: d, the width of z.
    """
    z = jax.ShapeDtypeStruct((2 * images, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((images,), jnp.int32)
    try:
        found = jax.eval_shape(loss.apply, z, labels)
    except Exception as error:  # whatever may be wrong in it
        raise UserError(
            f"loss.name={name}{_where(loss, error)} fails on z {list(z.shape)} and labels {list(labels.shape)}: "
            f"{type(error).__name__}: {one_line(error)[:300]}"
        ) from error
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise UserError(f"loss.name={name} returns {_in_words(found)}: {_EXPECTED}")
    value, metrics = found
    for what, one in {"the loss": value, **metrics}.items():
        if getattr(one, "shape", None) != () or not jnp.issubdtype(one.dtype, jnp.floating):
            raise UserError(f"loss.name={name}: {what} is {_in_words(one)}: {_EXPECTED}")
    taken = {*_TAKEN, *jax.eval_shape(spread_of, z)}
    if both := sorted(taken & set(metrics)):
        raise UserError(
            f"loss.name={name} reports {', '.join(both)}, which every run reports itself: expected other names"
        )
    if 2 * images <= _ROWS and not loss.takes_stored:
        _check_gradient(name, loss, images, width)


def _check_gradient(name: str, loss: Loss, images: int, width: int) -> None:
    """Raises a UserError if no gradient of the loss reaches z."""
    z = jax.random.normal(jax.random.key(0), (2 * images, width))
    labels = jnp.arange(images) // 2
    gradient = jax.jit(jax.grad(lambda z: loss.apply(z, labels)[0]))(z)
    if not gradient.any():
        raise UserError(
            f"loss.name={name} has no gradient: its value does not change with z, so that nothing would be learned"
        )


def _where(loss: Loss, error: Exception) -> str:
    """Returns " (FILE, line N)" of the last line of the loss's own file that the error went through, or ""."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(loss.apply))
    except TypeError:  # a functools.partial, for instance
        return ""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" ({file}, line {lines[-1]})" if lines else ""


def _in_words(found: Any) -> str:
    shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", found)
    return str(shapes).replace("'", "")
