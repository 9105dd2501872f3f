"""Images as encoders take them: floats in [0, 1]."""

from typing import Any

import jax.numpy as jnp


def to_float(images: Any) -> Any:
    """Turns uint8 images into float32 in [0, 1]; float images pass.

    They are not standardised further: the published code feeds [0, 1], and BatchNorm follows.
    """
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images


def check_are_floats(images: Any) -> None:
    """Raises a TypeError for images of whole numbers, of which an encoder would make wrong features without a word."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images are {images.dtype}: expected floats in [0, 1], so divide by 255")
