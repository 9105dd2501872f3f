"""Solarize: inverts what is bright (Grill et al. 2020, BYOL, arXiv 2006.07733, appendix B). Off by
default: SimCLR does not use it.
"""

import dataclasses
from typing import Any, ClassVar

from simclr_jax.options import Option, number
from simclr_jax.views.distortion import Channels, PixelOperation


@dataclasses.dataclass(frozen=True)
class Solarize(PixelOperation):
    """Replaces values x of at least the threshold by 1 - x.

    Attributes:
      solarize_probability: how often.
      solarize_threshold: in [0, 1].
    """

    solarize_probability: float = 0.0
    solarize_threshold: float = 0.5

    OPTIONS: ClassVar = (
        Option(
            "views.solarize_probability",
            0.0,
            number(0, 1),
            "of inverting what is bright; 0.2 for one view in BYOL",
        ),
        Option("views.solarize_threshold", 0.5, number(0, 1), "of solarize; pixels are in [0, 1]"),
    )
    NAME: ClassVar = "solarize"
    DRAWS: ClassVar = {"solarize": 1}

    @property
    def probability(self) -> float:
        return self.solarize_probability

    def formula(self, xp: Any, channels: Channels) -> Channels:
        return tuple(xp.where(c < self.solarize_threshold, c, 1.0 - c) for c in channels)
