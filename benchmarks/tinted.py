"""Writes tinted Fashion-MNIST, OUT.npz: `python benchmarks/tinted.py OUT.npz [--data_dir DIR]` (TFDS downloads 30 MB).

3,000 pictures to train on and 2,000 to test on, 28 px. Each has two colours drawn for itself, one for the garment
and one for what is behind it, which differ in brightness: colour tells the pictures apart, as the light and the
surroundings do in photographs, and says nothing about the class. A test of the reason that the paper gives for
composing crops with colour distortion (section 3.1, figure 6): crops of one picture share its colours.
"""

import argparse

import numpy as np

SEED, TRAIN, TEST = 0, 3000, 2000
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
LEAST_CONTRAST = 0.3


def tinted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mixes two colours of its own into each picture: uint8 [N, H, W, 1] to uint8 [N, H, W, 3]."""
    colours = rng.uniform(size=(len(images), 2, 3))
    while (close := np.abs(np.diff(colours @ LUMA)[:, 0]) < LEAST_CONTRAST).any():
        colours[close] = rng.uniform(size=(close.sum(), 2, 3))
    garment, behind = colours[:, 0, None, None], colours[:, 1, None, None]
    share = images / 255.0
    return np.round(255 * (share * garment + (1 - share) * behind)).astype(np.uint8)


def main() -> None:
    """Reads Fashion-MNIST and writes the file."""
    import tensorflow_datasets as tfds

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT.npz")
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
    arguments = parser.parse_args()
    rng, written = np.random.default_rng(SEED), {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        whole = tfds.as_numpy(
            tfds.load("fashion_mnist", split=split, batch_size=-1, data_dir=arguments.data_dir)
        )
        chosen = rng.permutation(len(whole["label"]))[:count]
        written[f"{split}_images"] = tinted(whole["image"][chosen], rng)
        written[f"{split}_labels"] = whole["label"][chosen].astype(np.int32)
    np.savez(arguments.out, **written)


if __name__ == "__main__":
    main()
