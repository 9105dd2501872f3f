"""Writes emoji as a folder of labelled pictures: `python benchmarks/emoji.py OUT` (needs npm and a network).

OUT/train and OUT/test hold CATEGORY/VENDOR_CODE.png: the pictures of 64 px of two vendors, on white, from
the packages emoji-datasource-twitter and -google 16.0.0, without components (skin tones, hair). A quarter
of the emoji, picked by a digest of their code points, is for testing: both drawings of an emoji are on
one side.
"""

import argparse
import hashlib
import io
import json
import pathlib
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

from PIL import Image

VENDORS, VERSION, TEST_SHARE = ("twitter", "google"), "16.0.0", 4


def pictures(vendor: str, folder: str) -> Iterator[tuple[dict, bytes]]:
    """Downloads a vendor's package into a folder; yields each emoji's description and PNG."""
    package = f"emoji-datasource-{vendor}@{VERSION}"
    found = subprocess.run(
        ["npm", "pack", "--silent", package],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    with tarfile.open(pathlib.Path(folder, found.stdout.split()[-1])) as archive:
        names = set(archive.getnames())
        (listed,) = (archive.extractfile(n) for n in names if n == "package/emoji.json")
        assert listed is not None
        for emoji in json.load(listed):
            name = f"package/img/{vendor}/64/{emoji['image']}"
            if name in names and emoji["category"] != "Component":
                image = archive.extractfile(name)
                assert image is not None
                yield emoji, image.read()


def digest(text: str) -> int:
    """Returns a number that depends on the text alone."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16)


def is_test(text: str) -> bool:
    """Returns whether what this text names, such as the code points of an emoji, is to test on: a quarter is."""
    return digest(text) % TEST_SHARE == 0


def on_white(picture: Image.Image) -> Image.Image:
    """Draws a transparent picture, RGBA, on white."""
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture)
    return paper.convert("RGB")


def main() -> None:
    """Writes all pictures, and says how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    count = {"train": 0, "test": 0}
    for vendor in VENDORS:
        with tempfile.TemporaryDirectory() as folder:
            for emoji, png in pictures(vendor, folder):
                split = "test" if is_test(emoji["unified"]) else "train"
                category = emoji["category"].replace(" & ", "_").replace(" ", "_")
                path = out / split / category / f"{vendor}_{emoji['image']}"
                path.parent.mkdir(parents=True, exist_ok=True)
                on_white(Image.open(io.BytesIO(png)).convert("RGBA")).save(path)
                count[split] += 1
    print(f"{count['train']} pictures to train on and {count['test']} to test on in {out}")


if __name__ == "__main__":
    main()
