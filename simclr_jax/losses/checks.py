"""Checks a loss against its contract before a run begins: a loss of one's own may be wrong in many ways."""

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from simclr_jax.errors import UserError, one_line
from simclr_jax.losses.contract import Loss
from simclr_jax.mesh import traced_on

# Names that runs report by themselves, see docs/health.md.
TAKEN = (
    *("step", "loss", "grad_norm", "update_norm", "learning_rate", "skipped_steps"),
    *("trust_ratio_min", "trust_ratio_median", "trust_ratio_max"),
    *("alignment", "z_std", "classifier_loss", "classifier_accuracy", "labelled_share"),
    *("rank_h", "rank_z", "uniformity", "images_per_second", "goodput"),
    *("share_of_time_input", "share_of_time_saving", "share_of_time_evaluating"),
    *("slowest_process", "slowest_process_share", "knn_accuracy", "probe_accuracy"),
    "transfer_accuracy",
)
_EXPECTED = "expected (float32 scalar, {name: scalar}), see losses.contract.Loss"
# Similarities of so many rows are computed in a moment; with larger batches no gradient is computed.
_ROWS = 2048


def check_kind(name: str, made: Any) -> Loss:
    """Returns what the builder of loss `name` made. Raises a UserError if that is no `Loss`."""
    if isinstance(made, Loss):
        return made
    raise UserError(
        f"loss.name={name}: its builder returned {made!r}: expected a losses.contract.Loss"
    )


def check_loss(name: str, loss: Loss, images: int, width: int, mesh: Mesh) -> None:
    """Traces `loss.apply` and its gradient as a step does. Raises a UserError unless it gives a scalar, and scalar metrics
    under names that are free.

    Args:
      name: the option loss.name.
      loss: what its builder made.
      images: B, of the global batch.
      width: d, the width of z.
      mesh: the devices of the step.
    """
    z = jax.ShapeDtypeStruct((2 * images, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((images,), jnp.int32)
    found = _traced(name, loss, loss.apply, z, labels, mesh)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise UserError(f"loss.name={name} returns {_in_words(found)}: {_EXPECTED}")
    value, metrics = found
    for what, one, kind in (
        ("the loss", value, jnp.floating),
        *((metric, x, jnp.number) for metric, x in metrics.items()),
    ):
        if getattr(one, "shape", None) != () or not jnp.issubdtype(one.dtype, kind):
            raise UserError(f"loss.name={name}: {what} is {_in_words(one)}: {_EXPECTED}")
    if both := [metric for metric in metrics if metric in TAKEN]:
        raise UserError(
            f"loss.name={name} reports {', '.join(both)}, which every run reports itself: expected other names"
        )
    _traced(name, loss, jax.grad(loss.apply, has_aux=True), z, labels, mesh)


def has_gradient(loss: Loss, images: int, width: int, mesh: Mesh) -> bool:
    """Returns whether a gradient of the loss reaches some random z; True, without a look, for large batches and for
    losses that take stored projections. The arguments are those of `check_loss`.
    """
    if 2 * images > _ROWS or loss.takes_stored:
        return True
    z = jax.random.normal(jax.random.key(0), (2 * images, width))
    labels = jnp.arange(images) // 2
    gradient = traced_on(mesh, jax.grad(lambda z: loss.apply(z, labels)[0]))
    return bool(jax.jit(gradient)(z).any())


def _traced(name: str, loss: Loss, function: Callable, z: Any, labels: Any, mesh: Mesh) -> Any:
    """Returns the shapes of function(z, labels). Raises a UserError that names the line if it fails."""
    try:
        return jax.eval_shape(traced_on(mesh, function), z, labels)
    except Exception as error:  # whatever may be wrong in it
        raise UserError(
            f"loss.name={name}{_where(loss, error)} fails on z {list(z.shape)} and labels {list(labels.shape)}: "
            f"{type(error).__name__}: {one_line(error)[:300]}"
        ) from error


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
