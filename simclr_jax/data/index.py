"""The index of a folder: which image files it holds, remembered across runs.

The index keeps, for each folder below, when it last changed and what lies in it, so that a later
start asks the file system once a folder and not once a file. A file that is overwritten in place changes
no folder, so the index keeps its old size until a file of the folder is added or removed.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import re
import time
from typing import NamedTuple

import numpy as np

from simclr_jax.errors import UserError
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

# Folders that programs make for themselves: macOS's archives, Synology, QNAP, Windows, ext4. Hidden
# ones, such as .ipynb_checkpoints and .Trash-1000, begin with a dot.
_SERVICE = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "lost+found"}
_SERVICE |= {"System Volume Information"}

# A folder that is read less than this many seconds after a change may change again without a new time, and a file
# in it may still be being written: the next start reads such a folder again.
_SETTLED = 2.0


# Programs that mount buckets, by the kind or the name of their file systems in /proc/self/mountinfo.
_BUCKETS = r"mount-s3|mountpoint-s3|rclone|s3fs|goofys|geesefs|gcsfuse|blobfuse"


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
    changed, seen, without_times = False, _folders_above(root), _devices_without_times()
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
            is_known = content and content["state"] == state and content["settled"]
            if content is None or not is_known or status.st_dev in without_times:
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


def _devices_without_times() -> set[int]:
    """Returns the device numbers of mounted buckets, whose folders may keep their time when their files change, as those of
    mount-s3 do, which have that of the mount.
    """
    try:
        mounts = (
            pathlib.Path("/proc/self/mountinfo").read_bytes().decode(errors="replace").splitlines()
        )
    except OSError:  # not on Linux
        return set()
    found = set()
    for mount in mounts:
        place, _, kind = mount.partition(" - ")  # proc(5)
        if kind.startswith(("fuse ", "fuse.")) and re.search(_BUCKETS, kind):
            major, minor = place.split()[2].split(":")
            found.add(os.makedev(int(major), int(minor)))
    return found


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
