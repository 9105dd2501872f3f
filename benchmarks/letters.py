"""Writes capital letters as a folder of labelled pictures: `python benchmarks/letters.py FONTS OUT`.

FONTS is the folder of Debian's package fonts-aenigma 0.0.20080511, 465 decorative fonts
(`apt-get install fonts-aenigma`, /usr/share/fonts/truetype/aenigma). OUT/train and OUT/test hold
LETTER/FONT.png: black on white, 32 px. Fonts whose names begin with the same four letters are often variants of
one; a quarter of these groups, picked by a digest of the four letters, is for testing.
"""

import argparse
import pathlib
import string

from emoji import is_test
from PIL import Image, ImageDraw, ImageFont

SIDE, MARGIN = 32, 2
# Drawn as large as this, then cut out and made smaller.
DRAWN = 128


def letter(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Draws a letter in the middle of a white square; None if the font leaves its place blank."""
    page = Image.new("L", (4 * DRAWN, 4 * DRAWN), 0)
    ImageDraw.Draw(page).text((DRAWN, DRAWN), character, fill=255, font=font)
    box = page.getbbox()
    if box is None:
        return None
    ink = page.crop(box)
    ink.thumbnail((SIDE - 2 * MARGIN, SIDE - 2 * MARGIN), Image.Resampling.LANCZOS)
    square = Image.new("L", (SIDE, SIDE), 255)
    place = (SIDE - ink.width) // 2, (SIDE - ink.height) // 2
    square.paste(0, place, ink)
    return square


def main() -> None:
    """Writes all pictures, and says how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("fonts", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    given = parser.parse_args()
    count = {"train": 0, "test": 0}
    for file in sorted(given.fonts.rglob("*.ttf")):
        split = "test" if is_test(file.stem.lower()[:4]) else "train"
        font = ImageFont.truetype(str(file), DRAWN)
        for character in string.ascii_uppercase:
            picture = letter(font, character)
            if picture is None:
                continue
            path = given.out / split / character / f"{file.stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            count[split] += 1
    print(f"{count['train']} pictures to train on and {count['test']} to test on in {given.out}")


if __name__ == "__main__":
    main()
