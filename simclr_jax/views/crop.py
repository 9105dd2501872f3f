"""The Inception crop and its resize (paper, appendix A), as formulas for host and device."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from simclr_jax.data.pixels import ReadOptions
from simclr_jax.options import flag, interval, option_field

CROP_ATTEMPTS = 10  # then the largest centred crop of an allowed aspect ratio is taken


@dataclasses.dataclass(frozen=True)
class Crop:
    """Which part of an image a view shows."""

    crop_area: tuple[float, float] = option_field(
        (0.08, 1.0), interval(1e-6, 1), "range of a crop's share of the image's area, uniform"
    )
    crop_aspect: tuple[float, float] = option_field(
        (3 / 4, 4 / 3), interval(0.01, 100), "range of a crop's width / height, log-uniform"
    )
    antialias: bool = option_field(
        False,
        flag(),
        "average all pixels of a crop that is made smaller, as Pillow does, in evaluation too; the "
        "published code weighs 4 x 4 of them",
    )

    NAME: ClassVar[str] = "crop"
    DRAWS: ClassVar[dict[str, int]] = {"attempts": 2 * CROP_ATTEMPTS, "position": 2}

    def window(self, xp: Any, height: Any, width: Any, u: dict[str, Any]) -> tuple:
        """Computes where a crop lies.

        Args:
          xp: the module that computes.
          height, width: the image's size, float scalars, pixels.
          u: "attempts" [2 * CROP_ATTEMPTS] in [0, 1), area and aspect ratio in turns: the first pair that
            fits into the image is taken; if none does, the centred crop of the nearest allowed aspect ratio.
            "position" [2] in [0, 1) places it.

        Returns:
          (top, left, height, width), whole numbers of pixels, as floats.
        """
        attempts, position = u["attempts"], u["position"]
        area, aspect = self.crop_area, self.crop_aspect
        areas = (area[0] + (area[1] - area[0]) * attempts[0::2]) * height * width
        low, high = math.log(aspect[0]), math.log(aspect[1])
        ratios = xp.exp(low + (high - low) * attempts[1::2])
        widths, heights = xp.round(xp.sqrt(areas * ratios)), xp.round(xp.sqrt(areas / ratios))
        fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
        ratio = xp.minimum(xp.maximum(width / height, aspect[0]), aspect[1])
        crop_width = xp.maximum(1.0, xp.minimum(width, xp.round(height * ratio)))
        crop_height = xp.maximum(1.0, xp.minimum(height, xp.round(width / ratio)))
        down, right = 0.5, 0.5
        # Walk from the last attempt to the first, so that the first one that fits is the one that stays. An argmax and an
        # index would be shorter, but in XLA on CPUs take a hundred times as long as all the rest of a small view.
        for i in reversed(range(CROP_ATTEMPTS)):
            crop_width = xp.where(fits[i], widths[i], crop_width)
            crop_height = xp.where(fits[i], heights[i], crop_height)
            down = xp.where(fits[i], position[0], down)
            right = xp.where(fits[i], position[1], right)
        top = xp.floor(down * (height - crop_height + 1))
        left = xp.floor(right * (width - crop_width + 1))
        return top, left, crop_height, crop_width

    def describe(self, height: int, width: int, u: dict[str, np.ndarray]) -> str:
        """Says which part of an image of `height` x `width` pixels a view shows; `u`: see `window`."""
        _, _, down, across = self.window(np, float(height), float(width), u)
        share = float(down * across) / (height * width)
        return f"crop {share:.0%}, {float(across):.0f} x {float(down):.0f} px"


def center_square(height: int, width: int, proportion: float) -> tuple[int, int, int]:
    """Returns (top, left, side), pixels, of the middle `proportion` of the largest centred square."""
    side = max(1, round(proportion * min(height, width)))
    return (height - side + 1) // 2, (width - side + 1) // 2, side


class EvaluationView(NamedTuple):
    """The one view of an image that evaluation takes: the largest centred square, of which the middle
    `proportion` of each side is kept and resized.

    Attributes:
      size: height and width of the view, pixels.
      proportion: in (0, 1].
      antialias: see `Crop`.
      read: how images become pixels, before all else.
    """

    size: int
    proportion: float = 1.0
    antialias: bool = False
    read: ReadOptions = ReadOptions()

    def of(self, image: np.ndarray) -> np.ndarray:
        """Makes the view, uint8 [size, size, C], of an upright image, uint8 [H, W, C], in NumPy."""
        height, width, _ = image.shape
        top, left, side = center_square(height, width, self.proportion)
        weights = resize_matrix(np, 0.0, float(side), side, self.size, self.antialias)
        # Without antialiasing most pixels of a photograph have no weight: 0.1 in place of 2 s at 24 million pixels.
        some = np.flatnonzero(weights.any(axis=0))
        weights = weights[:, some].astype(np.float32)
        square = image[np.ix_(top + some, left + some)].astype(np.float32)
        x = np.einsum("uh,hwc,vw->uvc", weights, square, weights, optimize=True)
        return np.round(np.clip(x, 0.0, 255.0)).astype(np.uint8)

    def by_option(self) -> dict[str, Any]:
        """Returns what decides the view, {option: value}, without the options' groups."""
        size, proportion, antialias, read = self
        sides = {"image_size": size, "eval_crop": proportion, "antialias": antialias}
        return sides | read._asdict()

    def describe(self) -> str:
        """Says in words what is cut from a picture, and to which size it is brought."""
        antialias = " with antialiasing" if self.antialias else ""
        kept = f"the middle {self.proportion:.1%} of each side of the centred square"
        return f"{self.size} px: {kept}, resized{antialias}"


def resize_matrix(
    xp: Any, start: Any, length: Any, source: int, size: int, antialias: bool = False
) -> Any:
    """Computes the weights [size, source] that resize a window of one axis, as `tf.image.resize` does.

    Bicubic (Keys, a = -0.5); at the window's edges the taps outside are left out and the rest scaled to
    sum 1.

    Args:
      xp: the module that computes.
      start, length: the window, pixels, floats.
      source: pixels of the image along the axis.
      size: pixels of the view.
      antialias: stretch the kernel over the pixels that a smaller view is made of.
    """
    outputs = np.arange(size, dtype=np.float32)[:, np.newaxis]
    inputs = np.arange(source, dtype=np.float32)[np.newaxis]
    distance = xp.abs(start + (outputs + 0.5) * (length / size) - 0.5 - inputs)
    if antialias:
        distance = distance / xp.maximum(length / size, 1.0)
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    nothing = 0.0 * distance
    weights = xp.where(distance < 1, near, xp.where(distance < 2, far, nothing))
    weights = xp.where((inputs >= start) & (inputs < start + length), weights, nothing)
    return weights / (weights @ np.ones((source, 1), np.float32))
