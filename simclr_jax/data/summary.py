"""The summary of a folder: what its images are like, from the headers of some of them."""

import collections
import concurrent.futures
import os
import pathlib
import statistics
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr_jax.data import pixels
from simclr_jax.data.index import SUFFIXES, list_images, most_common
from simclr_jax.data.subsets import evenly
from simclr_jax.errors import reason

_LOOKED_AT = 256  # files whose headers are read, evenly spaced
_DECODED = 32  # of the grey ones of 16 bits among them
_DARK = 4  # bits less than the brightest: a sixteenth of its range
_THREADS = 16
_LONG = 4  # ratio of the sides from which on most random crops of the automatic settings do not fit


class Summary(NamedTuple):
    """A summary of a folder's images, from the headers of some of them.

    Attributes:
      images: number of image files.
      total_bytes: size of all files.
      kinds: {format, by suffix: number of files}.
      passed_over, workdirs: see `Index`.
      empty: number of files without a byte.
      looked_at: number of files whose header was read.
      unreadable: {path: reason} of those whose header cannot be read.
      sizes: int [n, 2], width and height of the n readable ones, pixels.
      modes: {Pillow's name of the channel layout: number of readable ones}.
      stacks: number of readable ones that hold several frames.
      bits: {bits that it needs, see `pixels.bits_used`: number of some grey images of 16 bits}.
      deep_colours: number of PNGs of 16 bits in colour or transparent.
    """

    images: int
    total_bytes: int
    kinds: dict[str, int]
    passed_over: dict[str, int]
    workdirs: list[str]
    empty: int
    looked_at: int
    unreadable: dict[str, str]
    sizes: np.ndarray
    modes: dict[str, int]
    stacks: int
    bits: dict[int, int]
    deep_colours: int

    @property
    def sample_bits(self) -> int:
        """The bits of one scale for all images of 16 bits, by the brightest; 0: there are none, or each needs a scale of
        its own: more than a quarter would be nearly black, or there are images in colour, too.
        """
        most = max(self.bits, default=0)
        dark = sum(count for bits, count in self.bits.items() if bits <= most - _DARK)
        return 0 if self.deep_colours or 4 * dark > sum(self.bits.values()) else most

    @property
    def long(self) -> int:
        """Number of readable images that are more than four times as long as wide, or as wide as long."""
        return int(np.sum(self.sizes.max(axis=1) > _LONG * self.sizes.min(axis=1)))

    @property
    def short_side(self) -> int:
        """The median image's shorter side, pixels; 224 where no image could be read."""
        return int(statistics.median(self.sizes.min(axis=1))) if len(self.sizes) else 224


def summarize(root: pathlib.Path) -> Summary:
    """Summarizes the images below `root`, for which it reads the headers of some of them."""
    found = list_images(root)
    count = len(found.paths)
    some = evenly(count, _LOOKED_AT)
    paths = [root / found.paths[i] for i in some]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        headers = list(threads.map(_header, paths))
        deep = [p for p, h in zip(paths, headers, strict=True) if _may_have_16_bits(h)]
        bits = threads.map(pixels.bits_used, [deep[i] for i in evenly(len(deep), _DECODED)])
        of_bits = dict(sorted(collections.Counter(b for b in bits if b).items()))
    kinds = collections.Counter(SUFFIXES[os.path.splitext(p)[1].lower()] for p in found.paths)
    whole = [header for header in headers if isinstance(header, _Header)]
    return Summary(
        count,
        int(np.maximum(found.sizes, 0).sum()),
        dict(kinds.most_common()),
        found.passed_over,
        found.workdirs,
        int((found.sizes == 0).sum()),
        len(some),
        {
            found.paths[i]: header
            for i, header in zip(some, headers, strict=True)
            if isinstance(header, str)
        },
        np.asarray([header.size for header in whole], int).reshape(-1, 2),
        dict(collections.Counter(header.mode for header in whole).most_common()),
        sum(header.is_stack for header in whole),
        of_bits,
        sum(header.is_deep_colour for header in whole),
    )


def _may_have_16_bits(header: "_Header | str") -> bool:
    return isinstance(header, _Header) and header.mode.startswith("I")


class _Header(NamedTuple):
    """Holds what an image file says of itself before its pixels: (width, height), channel layout, several frames or one,
    and whether it is a PNG of 16 bits a sample in colour or transparent.
    """

    size: tuple[int, int]
    mode: str
    is_stack: bool
    is_deep_colour: bool


def _header(path: pathlib.Path) -> _Header | str:
    """Reads the header of an image; returns why it cannot be read, where that is known already."""
    try:
        with Image.open(path) as image:
            if problem := pixels.problem_of_mode(image):
                return problem
            deep = image.format == "PNG" and image.mode in ("RGB", "RGBA", "LA")
            deep = deep and pixels.is_png_of_16_bits(_beginning(path))
            return _Header(image.size, image.mode, _has_frames(image), deep)
    except Exception as error:  # whatever a damaged file may lead to
        return reason(error).replace(f" {str(path)!r}", "")


def _beginning(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return file.read(pixels.PNG_HEADER)


def _has_frames(image: Image.Image) -> bool:
    """Returns whether a file holds several frames: a stack or an animation. Those of a telephone's MPO are previews."""
    if image.format == "MPO":
        return False
    try:
        return getattr(image, "is_animated", False)  # n_frames would read all of a GIF
    except Exception:  # damaged behind the first frame
        return False


def summary_lines(found: Summary) -> list[str]:
    """Says what a folder holds, in lines of text."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in found.kinds.items())
    lines = [f"{found.images} files, {found.total_bytes / 1e6:.1f} MB: {kinds}"]
    if len(found.sizes):
        low, high = found.sizes.min(axis=0), found.sizes.max(axis=0)
        sizes = f"{low[0]} x {low[1]} px"
        if (low != high).any():
            sizes = (
                f"{low[0]} to {high[0]} px wide, {low[1]} to {high[1]} px high, median shorter side {found.short_side} "
                "px"
            )
        modes = ", ".join(f"{n} {mode}" for mode, n in found.modes.items())
        lines.append(f"{sizes}; channels {modes} (of {found.looked_at} looked at)")
    if found.bits and not found.sample_bits:
        deep = ", ".join(f"{count} use {bits} bits" for bits, count in found.bits.items())
        colour = f", and {found.deep_colours} are in colour" if found.deep_colours else ""
        lines.append(
            f"images of 16 bits: of {sum(found.bits.values())} grey ones looked at {deep}{colour}: each is scaled by the bits "
            "that it uses (data.sample_bits=0)"
        )
    if found.stacks:
        lines.append(
            f"{found.stacks} of {found.looked_at} looked at hold several frames: of each file the first is taken"
        )
    if found.long:
        lines.append(
            f"{found.long} of {found.looked_at} looked at: more than {_LONG} times as long as wide; most crops and all features "
            "show their middle alone"
        )
    bad = len(found.unreadable)
    if bad or found.empty:
        such = next(iter(found.unreadable.items()), None)
        what = f", such as {such[0]}: {such[1]}" if such else ""
        lines.append(
            f"{bad} of {found.looked_at} looked at cannot be read{what}; {found.empty} of all are empty"
        )
    else:
        lines.append(f"none empty; all of {found.looked_at} looked at can be opened")
    if found.passed_over:
        total = sum(found.passed_over.values())
        lines.append(
            f"passed over {total} files that are hidden or no images: {most_common(found.passed_over)}"
        )
    if found.workdirs:
        more = len(found.workdirs) - 3
        named = ", ".join(found.workdirs[:3]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"left out, with all images below, as workdirs of runs: {named}")
    return lines
