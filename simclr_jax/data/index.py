"""The index of a folder: which image files it holds, remembered across runs, and what they are like.

The index keeps, for each folder below, when it last changed and what lies in it, so that a later
start asks the file system once a folder and not once a file. A file that is overwritten in place changes
no folder, so the index keeps its old size until a file of the folder is added or removed.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import statistics
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr_jax.data import pixels
from simclr_jax.data.subsets import evenly
from simclr_jax.errors import UserError, reason
from simclr_jax.files import cache_folder, write_text

# By content a wrong suffix does no harm: it only says that the file is meant to be an image.
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    ".png": "PNG",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".webp": "WebP",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PNM"),
    ".avif": "AVIF",
    **dict.fromkeys((".jp2", ".j2k"), "JPEG 2000"),
    **dict.fromkeys((".heic", ".heif"), "HEIC"),
}

_LOOKED_AT = 256  # files whose headers are read for the summary, evenly spaced
_DECODED = 32  # of the grey ones of 16 bits among them
_THREADS = 16
_LONG = 4  # ratio of the sides from which on most random crops of the automatic settings do not fit
# Folders that programs make for themselves: macOS's archives, Synology, QNAP, Windows, ext4. Hidden
# ones, such as .ipynb_checkpoints and .Trash-1000, begin with a dot.
_SERVICE = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "lost+found"}
_SERVICE |= {"System Volume Information"}

# A folder that is read less than this many seconds after a change may change again without a new time, and a file
# in it may still be being written: the next start reads such a folder again.
_SETTLED = 2.0


class Index(NamedTuple):
    """The files below a folder.

    Attributes:
      paths: N, relative to it, sorted.
      sizes: int64 [N], bytes; -1: a link that leads nowhere.
      passed_over: {suffix, "" for none, or "hidden": number of files with it that are passed over}.
      workdirs: folders of runs, which are left out with all that is below them.
    """

    paths: list[str]
    sizes: np.ndarray
    passed_over: dict[str, int]
    workdirs: list[str]


def list_images(root: pathlib.Path) -> Index:
    """Lists the image files below `root`, at any depth, each folder once however many links lead to it.

    Hidden files, hidden folders, folders of services such as @eaDir and the workdirs of runs are left
    out. Of several ways to a folder the one without a link counts. A link to a folder that holds `root` is not
    followed.

    Raises:
      UserError: a folder cannot be read.
    """
    cache = _cache_file(root)
    known = _read_cache(cache)
    folders: dict[str, dict] = {}
    changed = _walk(root, known, folders)
    if changed or folders.keys() != known.keys():
        _write_cache(cache, folders)
    entries = sorted(
        (os.path.join(where, name) if where else name, size)
        for where, content in folders.items()
        for name, size in content["files"].items()
    )
    passed: collections.Counter[str] = collections.Counter()
    for content in folders.values():
        passed.update(content["others"])
    return Index(
        [path for path, _ in entries],
        np.asarray([size for _, size in entries], np.int64),
        dict(passed.most_common()),
        sorted(where for where, content in folders.items() if where and content["is_workdir"]),
    )


def _walk(root: pathlib.Path, known: dict[str, dict], folders: dict[str, dict]) -> bool:
    """Fills `folders`; returns whether any had to be read."""
    changed, seen = False, _folders_above(root)
    waiting, links = [""], collections.deque[str]()
    while waiting or links:
        where = waiting.pop() if waiting else links.popleft()
        path = root / where
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            content = known.get(where)
            # Copying and unpacking may restore the mtime, but not the ctime and the inode.
            state = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if content is None or content["state"] != state or not content["settled"]:
                content = _read_folder(path, state)
                changed = True
        except (FileNotFoundError, NotADirectoryError):  # gone meanwhile, or a dead link
            continue
        except OSError as error:
            remedy = "allow it" if isinstance(error, PermissionError) else "repair it"
            raise UserError(
                f"cannot read the folder {path}: {error.strerror}; {remedy}, or move the folder away"
            ) from error
        seen.add((status.st_dev, status.st_ino))
        if where and content["is_workdir"]:
            content = content | {"files": {}, "folders": [], "links": [], "others": {}}
        folders[where] = content
        waiting += [os.path.join(where, name) for name in content["folders"]]
        links += [os.path.join(where, name) for name in content["links"]]
    return changed


def _folders_above(root: pathlib.Path) -> set[tuple[int, int]]:
    """Returns device and inode of each folder that holds `root`."""
    found = set()
    for folder in root.resolve().parents:
        with contextlib.suppress(OSError):
            status = os.stat(folder)
            found.add((status.st_dev, status.st_ino))
    return found


def _read_folder(path: pathlib.Path, state: list[int]) -> dict:
    files: dict[str, int] = {}
    folders: list[str] = []
    links: list[str] = []
    others = collections.Counter[str]()
    names: set[str] = set()
    newest, dead_links = state[0] / 1e9, False
    with os.scandir(path) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            names.add(entry.name)
            hidden = entry.name.startswith(".")  # also macOS's shadows, ._NAME
            if _is_folder(entry):
                if not hidden and entry.name not in _SERVICE:
                    (links if entry.is_symlink() else folders).append(entry.name)
            elif suffix in SUFFIXES and not hidden:
                try:
                    status = entry.stat()
                    files[entry.name] = status.st_size
                    newest = max(newest, status.st_mtime)
                except OSError:  # a dead link
                    files[entry.name] = -1
            else:
                others["hidden" if hidden else suffix] += 1
            # A dead link may work once a drive is mounted, so the folder is read again.
            dead_links |= entry.is_symlink() and not os.path.exists(entry.path)
    return {
        "state": state,
        "settled": time.time() - newest >= _SETTLED and not dead_links,
        "files": files,
        "folders": sorted(folders),
        "links": sorted(links),
        "is_workdir": {"config.json", "checkpoints"} <= names,
        "others": dict(others),
    }


def _is_folder(entry: os.DirEntry) -> bool:
    """Returns whether an entry is a folder or a link to one. A link that leads nobody anywhere is none: one in
    a circle, or into a folder that may not be entered.
    """
    try:
        return entry.is_dir()
    except OSError:
        return False


def cache_of_folders() -> pathlib.Path:
    """Returns where indexes are kept, one file a folder."""
    return pathlib.Path(cache_folder()) / "folders"


def _cache_file(root: pathlib.Path) -> pathlib.Path:
    name = hashlib.blake2b(os.fsencode(root.absolute()), digest_size=16).hexdigest()
    return cache_of_folders() / f"{name}.json"


def _read_cache(file: pathlib.Path) -> dict[str, dict]:
    try:
        folders = json.loads(file.read_bytes())
        keys = {"state", "settled", "files", "folders", "links", "is_workdir", "others"}
        return folders if all(content.keys() == keys for content in folders.values()) else {}
    except (OSError, ValueError, AttributeError):  # none, or of another version
        return {}


def _write_cache(file: pathlib.Path, folders: dict[str, dict]) -> None:
    # No room for it: the next start reads the folder again.
    with contextlib.suppress(UserError):
        write_text(file, json.dumps(folders, ensure_ascii=True))


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
      sample_bits: the bits that the brightest of some grey images of 16 bits needs, see `pixels.bits_used`; 0: none.
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
    sample_bits: int

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
        sample_bits = max(bits, default=0)
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
        sample_bits,
    )


def _may_have_16_bits(header: "_Header | str") -> bool:
    return isinstance(header, _Header) and header.mode.startswith("I")


class _Header(NamedTuple):
    """Holds what an image file says of itself before its pixels: (width, height), channel layout, several frames or one."""

    size: tuple[int, int]
    mode: str
    is_stack: bool


def _header(path: pathlib.Path) -> _Header | str:
    """Reads the header of an image; returns why it cannot be read, where that is known already."""
    try:
        with Image.open(path) as image:
            return pixels.problem_of_mode(image) or _Header(
                image.size, image.mode, _has_frames(image)
            )
    except Exception as error:  # whatever a damaged file may lead to
        return reason(error).replace(f" {str(path)!r}", "")


def _has_frames(image: Image.Image) -> bool:
    """Returns whether a file holds several frames: a stack or an animation. Those of a telephone's MPO are previews."""
    if image.format == "MPO":
        return False
    try:
        return getattr(image, "is_animated", False)  # n_frames would read all of a GIF
    except Exception:  # damaged behind the first frame
        return False


def most_common(passed_over: dict[str, int]) -> str:
    """Names the five most common suffixes of `Index.passed_over`, files without one, and how many more there are, such as
    "3 .txt, 1 without suffix, 2 more".
    """
    some = list(passed_over.items())[:5]
    if "" in passed_over and "" not in dict(some):  # perhaps images that only need a suffix
        some.append(("", passed_over[""]))
    more = sum(passed_over.values()) - sum(n for _, n in some)
    named = [f"{n} {suffix or 'without suffix'}" for suffix, n in some]
    return ", ".join([*named, *([f"{more} more"] if more else [])])


def summary_lines(found: Summary) -> list[str]:
    """Says what a folder holds, in lines of text."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in found.kinds.items())
    lines = [f"{found.images} files, {found.total_bytes / 1e6:.1f} MB: {kinds}"]
    if len(found.sizes):
        low, high = found.sizes.min(axis=0), found.sizes.max(axis=0)
        sizes = f"{low[0]} x {low[1]} px"
        if (low != high).any():
            sizes = (
                f"{low[0]} to {high[0]} px wide, {low[1]} to {high[1]} px high, shorter side {found.short_side} px "
                "in the middle"
            )
        modes = ", ".join(f"{n} {mode}" for mode, n in found.modes.items())
        lines.append(f"{sizes}; channels {modes} (of {found.looked_at} looked at)")
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
