"""Sobel filter: how steep the grey values are (paper, figures 4 and 5, where no scale is published). Off by
default: SimCLR does not use it.
"""

import dataclasses
from typing import Any, ClassVar

from simclr_jax.options import number, option_field
from simclr_jax.views.color import luma
from simclr_jax.views.distortion import Channels, PixelOperation


@dataclasses.dataclass(frozen=True)
class Sobel(PixelOperation):
    """Replaces all channels by the length of the Sobel gradient of the luma, where 1 is a step from black to
    white along an axis. Pixels outside the view equal those on its edge.
    """

    sobel_probability: float = option_field(
        0.0, number(0, 1), "probability that a view is replaced by its edges"
    )

    NAME: ClassVar = "sobel"
    DRAWS: ClassVar = {"sobel": 1}

    def formula(self, xp: Any, channels: Channels) -> Channels:
        grey = luma(channels) if len(channels) == 3 else channels[0]
        up, down = _shifted(xp, grey, -2)
        left, right = _shifted(xp, grey, -1)
        across = _smoothed(xp, right - left, -2)
        along = _smoothed(xp, down - up, -1)
        length = xp.sqrt(across * across + along * along) / 4.0
        return (xp.minimum(length, 1.0),) * len(channels)


def _shifted(xp: Any, x: Any, axis: int) -> tuple[Any, Any]:
    """Returns x [..., S, S] moved by one pixel either way along an axis, -2 or -1; edges are repeated."""
    if axis == -2:
        first, last = x[..., :1, :], x[..., -1:, :]
        return xp.concat([first, x[..., :-1, :]], axis=-2), xp.concat(
            [x[..., 1:, :], last], axis=-2
        )
    first, last = x[..., :1], x[..., -1:]
    return xp.concat([first, x[..., :-1]], axis=-1), xp.concat([x[..., 1:], last], axis=-1)


def _smoothed(xp: Any, x: Any, axis: int) -> Any:
    """Returns the sum of x and its neighbours along an axis, weighted 1, 2, 1."""
    before, after = _shifted(xp, x, axis)
    return before + 2.0 * x + after
