"""Writes tinted Fashion-MNIST, OUT.npz: `python benchmarks/tinted.py OUT.npz [--moved] [--data_dir DIR]` (TFDS
downloads 30 MB).

3,000 pictures to train on and 2,000 to test on, 28 px. Each has two colours drawn for itself, one for the garment
and one for what is behind it, which differ in brightness: colour tells the pictures apart, as the light and the
surroundings do in photographs, and says nothing about the class. A test of the reason that the paper gives for
composing crops with colour distortion (section 3.1, figure 6): crops of one picture share its colours.

With --moved each garment is also made smaller, to between half and all of its size, and put in a random place, as
objects in photographs are: to tell its class one must see past size and place, which crops teach.
"""

import argparse

import numpy as np
from PIL import Image

SEED, TRAIN, TEST = 0, 3000, 2000
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
LEAST_CONTRAST = 0.3
SCALES = 0.5, 1.0  # uniform, with --moved


def tinted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mixes two colours of its own into each picture: uint8 [N, H, W, 1] to uint8 [N, H, W, 3]."""
    colours = rng.uniform(size=(len(images), 2, 3))
    while (close := np.abs(np.diff(colours @ LUMA)[:, 0]) < LEAST_CONTRAST).any():
        colours[close] = rng.uniform(size=(close.sum(), 2, 3))
    garment, behind = colours[:, 0, None, None], colours[:, 1, None, None]
    share = images / 255.0
    return np.round(255 * (share * garment + (1 - share) * behind)).astype(np.uint8)


def moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Makes each picture smaller and puts it in a random place on black: uint8 [N, H, W, 1] to the same."""
    found = np.zeros_like(images)
    for picture, place in zip(images[..., 0], found[..., 0], strict=True):
        height, width = (
            round(n * scale) for scale in [rng.uniform(*SCALES)] for n in picture.shape
        )
        small = Image.fromarray(picture).resize((width, height), Image.Resampling.BOX)
        top, left = (
            rng.integers(n - m + 1) for n, m in zip(place.shape, (height, width), strict=True)
        )
        place[top : top + height, left : left + width] = small
    return found


def main() -> None:
    """Reads Fashion-MNIST and writes the file."""
    import tensorflow_datasets as tfds

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT.npz")
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
    parser.add_argument("--moved", action="store_true", help="garments of any size and place")
    arguments = parser.parse_args()
    rng, written = np.random.default_rng(SEED), {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        whole = tfds.as_numpy(
            tfds.load("fashion_mnist", split=split, batch_size=-1, data_dir=arguments.data_dir)
        )
        chosen = rng.permutation(len(whole["label"]))[:count]
        images = whole["image"][chosen]
        written[f"{split}_images"] = tinted(moved(images, rng) if arguments.moved else images, rng)
        written[f"{split}_labels"] = whole["label"][chosen].astype(np.int32)
    np.savez(arguments.out, **written)


if __name__ == "__main__":
    main()
