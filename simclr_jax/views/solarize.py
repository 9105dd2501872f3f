"""Solarize: inverts what is bright (Grill et al. 2020, BYOL, arXiv 2006.07733, appendix B). Off by
default: SimCLR does not use it.
"""

import dataclasses
from typing import Any, ClassVar

from simclr_jax.options import number, option_field
from simclr_jax.views.distortion import Channels, PixelOperation


@dataclasses.dataclass(frozen=True)
class Solarize(PixelOperation):
    """Replaces values x of at least the threshold by 1 - x."""

    solarize_probability: float = option_field(
        0.0,
        number(0, 1),
        "probability that the bright pixels of a view are inverted; 0.2 for one of the two views in "
        "BYOL",
    )
    solarize_threshold: float = option_field(
        0.5,
        number(0, 1),
        "pixels from this value on, in [0, 1], are inverted when a view is solarized",
    )

    NAME: ClassVar = "solarize"
    DRAWS: ClassVar = {"solarize": 1}

    def formula(self, xp: Any, channels: Channels) -> Channels:
        return tuple(xp.where(c < self.solarize_threshold, c, 1.0 - c) for c in channels)
