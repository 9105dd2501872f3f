"""A crop of the crop: the operation "crop" of the paper's figure 5, where all views begin as one shared crop.
Off by default: SimCLR crops once.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from simclr_jax.options import number, option_field
from simclr_jax.views.crop import Crop, resize_matrix
from simclr_jax.views.distortion import Channels, Operation, happening

_LAW = Crop()  # the paper's: a share of 0.08 to 1 of the area, width / height of 3/4 to 4/3


@dataclasses.dataclass(frozen=True)
class Recrop(Operation):
    """Crops a view once more, by the paper's law, and resizes it."""

    recrop_probability: float = option_field(
        0.0, number(0, 1), "probability that a view is cropped once more"
    )

    NAME: ClassVar = "recrop"
    DRAWS: ClassVar = {"recrop": 1, **Crop.DRAWS}
    FUSED: ClassVar = False

    def host(self, x: Any, u: dict[str, Any]) -> Any:
        import tensorflow as tf

        def cropped(x):
            rows, columns = _matrices(tf, x.shape[-1], u)
            made = rows @ x @ tf.transpose(columns)
            return tf.clip_by_value(made, 0.0, 1.0)  # bicubic interpolation passes them

        return happening(self.happens(u), cropped, x)

    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        import jax
        import jax.numpy as jnp

        views, size = channels[0].shape[:-2], channels[0].shape[-1]
        flat = {name: numbers.reshape(-1, numbers.shape[-1]) for name, numbers in u.items()}
        rows, columns = jax.vmap(lambda numbers: _matrices(jnp, size, numbers))(flat)
        rows, columns = (x.reshape(*views, size, size) for x in (rows, columns))
        happens = self.happens(u)

        def cropped(c):
            # A view must be right to half a grey level, which bfloat16 is not.
            made = jnp.einsum(
                "...uh,...hw,...vw->...uv", rows, c, columns, precision=jax.lax.Precision.HIGHEST
            )
            return jnp.where(happens, jnp.clip(made, 0.0, 1.0), c)

        return tuple(cropped(c) for c in channels)

    def drawn(self, u: dict[str, np.ndarray], channels: int) -> str:
        _, _, height, width = _LAW.window(np, 1000.0, 1000.0, u)
        return f"cropped again, {float(height * width) / 1e6:.0%}"


def _matrices(xp: Any, size: int, u: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the weights [size, size] that crop and resize rows, and those of columns."""
    top, left, height, width = _LAW.window(xp, float(size), float(size), u)
    return (
        resize_matrix(xp, top, height, size, size),
        resize_matrix(xp, left, width, size, size),
    )
