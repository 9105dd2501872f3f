"""Makes the sheet of views: some images, and what training sees of each."""

import os

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import say
from simclr_jax.data import read_options
from simclr_jax.data.folder import root_of
from simclr_jax.data.pictures import pictures_of, places_of
from simclr_jax.data.split import Split
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh
from simclr_jax.report.thumbnails import tile
from simclr_jax.views.sample import sample_views

_IMAGES, SHEET_EPOCHS = 8, 3
_SIDE = 132  # pixels


def sheet_of(config: ConfigDict, split: Split) -> list[dict]:
    """Makes a row for each of eight images: {"original", "pairs"}, tiles as in `thumbnails.tile`; a pair is {"said": which
    epoch it is of, "views"}.

    Args:
      config: the run's configuration.
      split: its training images.

    Raises:
      UserError: none of the images can be read.
    """
    made = assemble.views(config, make_mesh())
    rows = []
    for picture in pictures_of(split, _IMAGES, read_options(config.data)):
        height, width, channels = picture.image.shape
        name = name_of_image(split, picture.place)
        colour = np.repeat(picture.image, 3 // channels, axis=-1)
        lines = [short_name(name), f"{width} x {height} px"]
        sampled = sample_views(made, picture.image, picture.place, SHEET_EPOCHS)
        shown = [tile(view.image, _SIDE, name, view.drawn) for view in sampled]
        pairs = [
            {"said": f"epoch {epoch + 1}", "views": shown[2 * epoch : 2 * epoch + 2]}
            for epoch in range(SHEET_EPOCHS)
        ]
        rows.append({"original": tile(colour, _SIDE, name, lines), "pairs": pairs})
    places = places_of(split, _IMAGES)
    asked = len(places)
    if not rows:
        reasons = [f"{split.name_of(i)} ({why})" for i, why in split.problems(places).items()]
        such = f", such as {reasons[0]}" if reasons else ""
        raise UserError(f"none of {asked} images can be read{such}")
    if len(rows) < asked:
        say(f"views       of {len(rows)} images: {asked - len(rows)} of {asked} cannot be read")
    return rows


def short_name(name: str) -> str:
    """Returns the end of a path that tells images apart: the file and its folder."""
    return "/".join(name.split("/")[-2:])


def name_of_image(split: Split, index: int) -> str:
    """Returns what a person calls an image: its path below the data's folder, or what the split calls it."""
    name, root = split.name_of(index), root_of(split)
    return name if root is None else os.path.relpath(name, root)
