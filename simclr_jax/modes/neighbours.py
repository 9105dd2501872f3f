"""--mode=neighbours: shows which images the encoder takes for alike, in a picture for a person or in a table."""

import contextlib
import csv
import os
import pathlib

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from simclr_jax.console import Progress, say
from simclr_jax.data import read_options
from simclr_jax.data.decoding import Decoding
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import Example
from simclr_jax.data.subsets import evenly
from simclr_jax.errors import UserError
from simclr_jax.evals.nearest import nearest
from simclr_jax.files import check_local, expanded, replacing, writing
from simclr_jax.modes.embed import Input, open_input
from simclr_jax.modes.feature_file import FeatureFile, read_feature_file, write_columns
from simclr_jax.training.saved import beside

_NEIGHBOURS = 8
_QUERIES = 8
_MOST_IN_A_PICTURE = 40
_TOGETHER = 4096  # rows of a table that are searched for in one pass through the file
_TILE = 96  # pixels
_LINE = 14  # height of the similarity below an image


def neighbours(
    config: ConfigDict,
    workdir: str,
    input: str,
    output: str | None = None,
    query: str = "",
    k: int = _NEIGHBOURS,
) -> None:
    """Writes a picture: in each row a query and, to its right, its k nearest neighbours with their cosine
    similarities. Or a table, a row for each query: "image", "neighbours", the names of the k nearest, and
    "similarities", float32.

    Args:
      config: the run's configuration.
      workdir: the run's folder.
      input: the file that --mode=embed wrote.
      output: the picture, or the table if it ends in .parquet; None: WORKDIR/neighbours.png, or of a
        checkpoint below a workdir WORKDIR/neighbours_step_STEP.png.
      query: images, as named in the file, separated by commas, a name with commas in double quotes; "": all for a table, eight for a picture.
      k: neighbours of each; at most all other images.

    Raises:
      UserError: no such file or image, the images that it names are missing or have changed, or k is below 1 or too
        large for a picture.
    """
    folder, suffix = beside(workdir)
    output = output or str(folder / f"neighbours{suffix}.png")
    check_local("--output", output)
    features = read_feature_file(input)
    _check_what_is_replaced(expanded(output), features)
    count = len(features.images)
    if count < 2:
        raise UserError(f"{input} holds {count} images: expected two or more")
    if k < 1:
        raise UserError(f"--k={k}: expected 1 or more")
    if output.endswith(".parquet"):
        queries = _indices(features, query) if query else np.arange(count)
        _write_table(expanded(output), features, queries, min(k, count - 1))
        return
    format = Image.registered_extensions().get(os.path.splitext(output)[1].lower())
    if format not in Image.SAVE:
        raise UserError(f"--output={output}: expected a picture, such as .png or .jpg, or .parquet")
    if k > _MOST_IN_A_PICTURE:
        raise UserError(
            f"--k={k}: a picture shows at most {_MOST_IN_A_PICTURE}; --output=FILE.parquet takes more"
        )
    queries = _indices(features, query)
    found, similar = nearest(features.blocks, queries, min(k, count - 1))
    try:
        source = open_input(config, features.about["input"])
    except UserError as error:
        raise UserError(
            f"the images that {input} was made of are not there any more ({error}): put them back, or run --mode=embed "
            "again; a table, --output=FILE.parquet, needs no images"
        ) from error
    if source.split.fingerprint() != features.about["images"]:
        raise UserError(
            f"{features.about['input']!r} holds other images than {input} was made of: run --mode=embed "
            "again, or name the --workdir that it was run with"
        )
    root = source.root
    if root and os.path.relpath(expanded(output), root) in set(features.images.tolist()):
        raise UserError(f"--output={output} is one of the images, which would be overwritten")
    needed = sorted({*queries.tolist(), *found.ravel().tolist()})
    names = [str(features.images[i]) for i in needed]
    pictures = dict(zip(needed, _pictures(source, names, read_options(config.data)), strict=True))
    grid = _grid(pictures, queries, found, similar)
    path = expanded(output)
    try:
        with writing(path), replacing(path) as scratch:
            grid.save(scratch, format)
    except ValueError as error:  # of a format that has no such pictures
        raise UserError(f"cannot write {path}: {error}") from error
    for q, row, values in zip(queries, found, similar, strict=True):
        near = ", ".join(f"{features.images[i]} {s:.2f}" for i, s in zip(row, values, strict=True))
        say(f"{features.images[q]}: {near}")
    say(f"\n{len(queries)} images, each left of its nearest of {count}: {path}")


def _check_what_is_replaced(path: pathlib.Path, features: FeatureFile) -> None:
    """Raises a UserError if the output would replace the features, or a table of something else."""
    if not path.exists():
        return
    if path.samefile(features.path):
        raise UserError(f"--output={path} is the --input, which would be overwritten")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with contextlib.suppress(pa.ArrowException, OSError):
            if "neighbours" in pq.read_schema(path).names:
                return
        raise UserError(
            f"--output={path} would replace a file that --mode=neighbours did not write: expected another name"
        )


def _write_table(path: pathlib.Path, features: FeatureFile, queries: np.ndarray, k: int) -> None:
    """Writes the table of `neighbours`, whole or not at all."""

    def columns(start: int) -> dict[str, np.ndarray]:
        asked = queries[start : start + _TOGETHER]
        found, similar = nearest(features.blocks, asked, k)
        names = features.images
        return {"image": names[asked], "neighbours": names[found], "similarities": similar}

    starts = range(0, len(queries), _TOGETHER)
    with writing(path), replacing(path) as scratch, Progress(len(starts)) as progress:
        write_columns(pathlib.Path(scratch), map(columns, progress.track(starts)))
    say(f"{len(queries)} images and the {k} nearest of each, of {len(features.images)}: {path}")


def _indices(features: FeatureFile, query: str) -> np.ndarray:
    if not query:
        return evenly(len(features.images), _QUERIES)
    place = {name: i for i, name in enumerate(features.images.tolist())}
    asked = [query] if query in place else next(csv.reader([query]))
    for name in asked:
        if name not in place:
            raise UserError(
                f"no image {name!r} in {features.path}: expected a path or index as it is there, "
                f"such as {features.images[0]}"
                + ", in double quotes if it has a comma"
                * ("," in query)
            )
    return np.asarray([place[name] for name in asked])


def _grid(pictures: dict[int, Image.Image], queries, found, similar) -> Image.Image:
    gap = _TILE // 4
    width = _TILE * (1 + found.shape[1]) + gap
    grid = Image.new("RGB", (width, (_TILE + _LINE) * len(queries)), "white")
    draw = ImageDraw.Draw(grid)
    for r, q in enumerate(queries.tolist()):
        top = r * (_TILE + _LINE)
        _paste(grid, pictures[q], 0, top)
        for c, i in enumerate(found[r].tolist()):
            left = _TILE * (c + 1) + gap
            _paste(grid, pictures[i], left, top)
            draw.text((left + _TILE // 3, top + _TILE), f"{similar[r, c]:.2f}", "black")
    return grid


def _paste(grid: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    margin = 4
    side = _TILE - margin
    scale = side / max(picture.size)
    size = tuple(max(1, round(scale * n)) for n in picture.size)
    small = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    grid.paste(small, (left + (side - size[0]) // 2, top + (side - size[1]) // 2))


def _pictures(source: Input, names: list[str], options: ReadOptions) -> list[Image.Image]:
    if source.root is not None:
        assert isinstance(source.split, IndexedSplit)
        files = source.split.source
        return [_opened(files, source.root / name, options) for name in names]
    indices = sorted(int(name) for name in names)
    some = source.split.subset(np.asarray(indices))
    assert isinstance(some, IndexedSplit)
    by_name = {
        str(i): _picture(some.source, some.source[p], options) for p, i in enumerate(indices)
    }
    return [by_name[name] for name in names]


def _picture(decoding: Decoding, example: Example, options: ReadOptions) -> Image.Image:
    """Returns the picture in colour, as the encoder saw it."""
    if isinstance(example.image, bytes):
        return Image.fromarray(decoding.pixels(example.image, options))
    x = example.image
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).convert("RGB")


def _opened(files: Decoding, path: pathlib.Path, options: ReadOptions) -> Image.Image:
    try:
        return _picture(files, Example(path.read_bytes()), options)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; was the folder moved since?") from error
