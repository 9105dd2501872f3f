"""Writes clip art as a folder of labelled pictures: `python benchmarks/clipart.py PNG OUT`.

PNG is the folder of Debian's package openclipart-png 0.18 (`apt-get install openclipart-png`,
/usr/share/openclipart/png). OUT/train and OUT/test hold CLASS/FILE.png: pictures of at most 64 px, on white,
of the classes with 100 pictures or more, at most 400 of each. Files of over 100 kB are left out: some hold
hundreds of millions of pixels. Names that begin with the same word are drawings of one series; a quarter of the
series, picked by a digest of that word, is for testing.
"""

import argparse
import pathlib
import re

from emoji import digest, is_test, on_white
from PIL import Image

FEWEST, MOST, LARGEST, SIDE = 100, 400, 100_000, 64
# Folders of the package that are no classes; of its shapes five in six are stars.
LEFT_OUT = ("shapes", "special", "unsorted")


def series_of(name: str) -> str:
    """Returns the word that the name of a picture begins with, or ""."""
    found = re.match("[a-z]*", name.lower())
    assert found is not None
    return found.group()


def different(files: list[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the files of different contents, the first of each; links and large files are left out."""
    first: dict[bytes, pathlib.Path] = {}
    for file in files:
        if not file.is_symlink() and file.stat().st_size <= LARGEST:
            first.setdefault(file.read_bytes(), file)
    return list(first.values())


def small(path: pathlib.Path) -> Image.Image:
    """Reads a picture, RGBA of at most 64 px."""
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


def main() -> None:
    """Writes all pictures, and says how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("png", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    given = parser.parse_args()
    count = {"train": 0, "test": 0}
    for folder in sorted(given.png.iterdir()):
        files = different(sorted(folder.rglob("*.png")))
        if folder.name in LEFT_OUT or len(files) < FEWEST:
            continue
        for file in sorted(files, key=lambda f: digest(str(f.relative_to(given.png))))[:MOST]:
            split = "test" if is_test(series_of(file.name)) else "train"
            path = given.out / split / folder.name / "_".join(file.relative_to(folder).parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            on_white(small(file)).save(path)
            count[split] += 1
    print(f"{count['train']} pictures to train on and {count['test']} to test on in {given.out}")


if __name__ == "__main__":
    main()
