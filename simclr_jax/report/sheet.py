"""Makes the sheet of views: some images, and what training sees of each."""

import os

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.data.folder import root_of
from simclr_jax.data.pictures import pictures_of
from simclr_jax.data.split import Split
from simclr_jax.mesh import make_mesh
from simclr_jax.report.thumbnails import tile
from simclr_jax.views.sample import sample_views

_IMAGES, SHEET_EPOCHS = 8, 3
_SIDE = 132  # pixels


def sheet_of(config: ConfigDict, split: Split) -> list[dict]:
    """Makes a row for each of eight images: {"original", "views"}, tiles as in `thumbnails.tile`.

    Args:
      config: the run's configuration.
      split: its training images.
    """
    made = assemble.views(config, make_mesh())
    rows = []
    for picture in pictures_of(split, _IMAGES, config.data.upright):
        height, width, channels = picture.image.shape
        name = name_of_image(split, picture.place)
        colour = np.repeat(picture.image, 3 // channels, axis=-1)
        lines = [os.path.basename(name), f"{width} x {height} px"]
        sampled = sample_views(made, picture.image, picture.place, SHEET_EPOCHS)
        shown = [tile(view.image, _SIDE, name, view.drawn) for view in sampled]
        rows.append({"original": tile(colour, _SIDE, name, lines), "views": shown})
    return rows


def name_of_image(split: Split, index: int) -> str:
    """Returns what a person calls an image: its path below the data's folder, or what the split calls it."""
    name, root = split.name_of(index), root_of(split)
    return name if root is None else os.path.relpath(name, root)
