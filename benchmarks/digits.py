"""Writes scikit-learn's digits, enlarged from 8 to 32 px, for learning.py: `python benchmarks/digits.py OUT.npz`."""

import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZE = 32


def main() -> None:
    """Divides the images as the package's data set "digits" does, and writes the file."""
    data = load_digits()
    small = np.round(data.images * (255 / 16)).astype(np.uint8)
    images = np.stack(
        [
            np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            for x in small
        ]
    )[..., np.newaxis]
    parts = train_test_split(
        np.arange(len(images)), test_size=0.2, random_state=0, stratify=data.target
    )
    written = {}
    for name, part in zip(("train", "test"), parts, strict=True):
        written[f"{name}_images"], written[f"{name}_labels"] = images[part], data.target[part]
    np.savez(sys.argv[1], **written)


if __name__ == "__main__":
    main()
