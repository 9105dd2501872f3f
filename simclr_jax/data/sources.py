"""Where images come from. One seam: `open_source(...)` gives the training and the test `Split`.

A split answers two questions with a tf.data.Dataset of raw examples, and says how to decode one:
which examples come next in training, and which are all of them for evaluation. TensorFlow is
imported where it is used, so that importing this module does not need it.
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Iterator, Set
from typing import Any, Protocol

import numpy as np

from simclr_jax.data.folder import SUFFIXES, index
from simclr_jax.data.order import batch_positions, epoch_order, split_validation
from simclr_jax.errors import UserError

# A TFDS split of images of one shape is held in memory up to this size: any order is then free,
# and nothing is decoded twice.
_IN_MEMORY_BYTES = 2**30

# A stream from files is shuffled by windows: as many whole files as hold this many raw examples,
# in the epoch's order of the files, and within them any order. 8k JPEGs of ImageNet are 0.9 GB, of
# which two windows are held. To start anywhere, no more than one window is read in vain.
_WINDOW = 8 * 1024
_FILES_AT_ONCE = 16

# A subset of a stream is held encoded, in up to this share of the machine's memory: 10 % of ImageNet
# is 14 GB.
_MEMORY_FOR_SUBSETS = 0.25

BROKEN = -2  # stands for the label of an image that cannot be read; -1 is an image without a label


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every global batch that this process loads: the `index`-th of `count`."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        part = batch_size // self.count
        return slice(self.index * part, (self.index + 1) * part)


_NONE: Set[int] = frozenset()


class Split(Protocol):
    """One split of a data set.

    Attributes:
      count: images.
      classes: names of the classes, or None where there are no labels.
      image_shape: (height, width, channels), None where it varies or is not known.
    """

    @property
    def count(self) -> int: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]: ...

    def training(
        self, seed: int, batch_size: int, start_step: int, share: Share, broken: Set[int] = _NONE
    ) -> Any:
        """Endless tf.data.Dataset of {"image", "label", "index", "epoch"}: this process's share of
        the global batches from `start_step` on, a new shuffle each epoch. Nothing that was passed
        over is decoded. In place of a broken image stands the next one that is not.
        """

    def entries(
        self, seed: int, batch_size: int, start_step: int, share: Share, broken: Set[int] = _NONE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(epochs, indices) of the batches of `training`, where that is known without reading."""

    def once(self, share: Share, start: int = 0, broken: Set[int] = _NONE) -> Any:
        """tf.data.Dataset of {"image", "label"}: this process's share of the split, each image once
        over all processes. Process p of P holds images p, p + P, ..., of which the first `start`
        are passed over. In place of a broken image stands another, with the label BROKEN.
        """

    def stand_ins(self, broken: Set[int]) -> np.ndarray:
        """[N]: each image itself, or if it is broken the next one that is not."""

    def all_labels(self) -> np.ndarray:
        """int32 [N], in the split's order; decodes no image."""

    def subset(self, indices: np.ndarray) -> "IndexedSplit":
        """These images, as a split of their own."""

    def check_subset(self, count: int) -> None:
        """Raises a UserError if so many images are too many for `subset`."""

    def divided(self, fraction: float, seed: int) -> tuple["Split", "Split"]:
        """About 1 - fraction of the images, and the rest, chosen by the seed."""

    def decode(self, image: Any) -> Any:
        """What "image" holds to uint8 [H, W, C], in the tf.data graph."""

    def name_of(self, index: int) -> str:
        """What a person calls an image."""

    def problem(self, index: int) -> str | None:
        """Why the image cannot be read, or None if it can."""

    def fingerprint(self) -> str:
        """Equal for splits of equal content, wherever they lie."""


@dataclasses.dataclass(frozen=True)
class IndexedSplit:
    """Images that can be read in any order: arrays, or one file each.

    The order is global: the content of a global batch does not depend on the number of processes.

    Attributes:
      images: uint8 [N, H, W, C], or the paths of N image files, or, as objects, what is in N image
        files.
      labels: int32 [N], -1 where there is none.
      sizes: int64 [N] of the files, bytes.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] | None = None
    sizes: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        return self.images.shape[1:] if self.in_memory else (None, None, 3)

    @property
    def in_memory(self) -> bool:
        return self.images.dtype == np.uint8

    def _lookup(self):
        """index, or indices -> {"image", "label"}, in the graph. The arrays are captured once, not
        copied into the graph's definition for each use.
        """
        import tensorflow as tf

        with tf.device("cpu"):
            images, labels = tf.constant(self.images), tf.constant(self.labels)
        return lambda index: {"image": tf.gather(images, index), "label": tf.gather(labels, index)}

    def all_labels(self) -> np.ndarray:
        return self.labels

    def subset(self, indices: np.ndarray) -> "IndexedSplit":
        return IndexedSplit(self.images[indices], self.labels[indices], self.classes)

    def check_subset(self, count: int) -> None:
        pass  # they are in memory, or paths

    def divided(self, fraction: float, seed: int) -> tuple["Split", "Split"]:
        part, rest = split_validation(self.labels, fraction, seed)
        return self.subset(part), self.subset(rest)

    def stand_ins(self, broken: Set[int]) -> np.ndarray:
        stand_in = np.arange(self.count)
        if broken:
            whole = np.setdiff1d(stand_in, list(broken))
            bad = np.sort(list(broken))
            stand_in[bad] = whole[np.searchsorted(whole, bad) % len(whole)]
        return stand_in

    def training(
        self, seed: int, batch_size: int, start_step: int, share: Share, broken: Set[int] = _NONE
    ) -> Any:
        return self.whole_batches(seed, batch_size, start_step, share, broken).unbatch()

    def whole_batches(
        self, seed: int, batch_size: int, start_step: int, share: Share, broken: Set[int] = _NONE
    ) -> Any:
        """The examples of `training`, this process's share of a global batch at a time."""
        import tensorflow as tf

        lookup = self._lookup()
        positions = tf.data.Dataset.from_generator(
            lambda: self.entries(seed, batch_size, start_step, share, broken),
            output_signature=(
                tf.TensorSpec([batch_size // share.count], tf.int64),
                tf.TensorSpec([batch_size // share.count], tf.int64),
            ),
        )
        return positions.map(
            lambda epoch, index: lookup(index) | {"index": index, "epoch": epoch},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def entries(
        self, seed: int, batch_size: int, start_step: int, share: Share, broken: Set[int] = _NONE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        stand_in, rows = self.stand_ins(broken), share.rows(batch_size)
        for epochs, indices in batch_positions(seed, self.count, batch_size, start_step, rows):
            yield epochs, stand_in[indices]

    def once(self, share: Share, start: int = 0, broken: Set[int] = _NONE) -> Any:
        import tensorflow as tf

        lookup = self._lookup()
        mine = np.arange(share.index, self.count, share.count)[start:]
        entries = tf.data.Dataset.from_tensor_slices(
            (self.stand_ins(broken)[mine], np.isin(mine, list(broken)))
        )

        def example(index, is_broken):
            found = lookup(index)
            return found | {"label": tf.where(is_broken, BROKEN, found["label"])}

        return entries.map(example)

    def decode(self, image: Any) -> Any:
        if self.in_memory:
            return image
        import tensorflow as tf

        from simclr_jax.data import header, other_formats
        from simclr_jax.data.transparency import decode_on_white

        encoded = self.images.dtype == object
        data = header.checked(image if encoded else tf.io.read_file(image))
        decoded = tf.cond(
            other_formats.is_other(data),
            lambda: other_formats.decode(data),
            lambda: decode_on_white(data),
        )
        return tf.ensure_shape(decoded, [None, None, 3])

    def name_of(self, index: int) -> str:
        return f"image {index}" if self.images.dtype.kind != "U" else str(self.images[index])

    def problem(self, index: int) -> str | None:
        if self.in_memory:
            return None
        import tensorflow as tf

        try:
            self.decode(tf.constant(self.images[index]))
        except tf.errors.OpError as error:
            return reason_of(error)
        return None

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        if self.in_memory:
            digest.update(str(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images).data)
        else:
            # Names below the folder they share, and sizes: reading all would take too long.
            root = os.path.commonpath([os.path.dirname(path) for path in self.images])
            sizes = [-1] * self.count if self.sizes is None else self.sizes.tolist()
            for path, size in zip(self.images.tolist(), sizes, strict=True):
                digest.update(os.fsencode(path[len(root) :]) + f" {size}\n".encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class FilesSplit:
    """A TFDS split that is too large for memory, read from its record files.

    The order of an epoch is a shuffle of the files, and a shuffle of the examples of some files at
    a time. Each process reads its own part of each epoch's files, so here, unlike with an
    `IndexedSplit`, the content of a global batch does depend on the number of processes.

    Attributes:
      builder: the TFDS builder, prepared, with TFRecord files.
      name: of the split.
      classes: see `Split`.
      files: which of its files, ascending; None: all.
    """

    builder: Any
    name: str
    classes: tuple[str, ...] | None
    files: tuple[int, ...] | None = None

    @property
    def _files(self) -> tuple[list[str], np.ndarray]:
        """Paths, and how many examples each file holds."""
        info = self.builder.info.splits[self.name]
        paths, lengths = [str(p) for p in info.filepaths], np.asarray(info.shard_lengths)
        mine = range(len(paths)) if self.files is None else self.files
        return [paths[i] for i in mine], lengths[list(mine)]

    @property
    def count(self) -> int:
        return int(self._files[1].sum())

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        return self.builder.info.features["image"].shape

    def _parse(self, serialized):
        import tensorflow as tf
        import tensorflow_datasets as tfds

        example = self.builder.info.features.deserialize_example(
            serialized, decoders={"image": tfds.decode.SkipDecoding()}
        )
        label = tf.cast(example["label"], tf.int32) if self.classes else tf.constant(-1)
        return {"image": example["image"], "label": label}

    def training(
        self, seed: int, batch_size: int, start_step: int, share: Share, broken: Set[int] = _NONE
    ) -> Any:
        import tensorflow as tf

        names, lengths = self._files
        if len(lengths) < share.count:
            raise UserError(
                f"{self.builder.name}/{self.name} has {len(lengths)} files, fewer than the "
                f"{share.count} processes that would share them: prepare it with more shards"
            )
        paths = np.asarray(names)
        first_index = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        passed = start_step * (batch_size // share.count)

        def entries() -> Iterator[tuple]:
            for epoch, files, order in _windows(seed, lengths, share, passed):
                yield paths[files], first_index[files], order, epoch

        def records(path, first):
            return tf.data.TFRecordDataset(path).enumerate(first)

        def window(paths, first_indices, order, epoch):
            files = tf.data.Dataset.from_tensor_slices((paths, first_indices))
            whole = files.interleave(
                records, _FILES_AT_ONCE, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
            ).batch(_WINDOW + tf.reduce_max(lengths))
            return whole.map(
                lambda index, record: (
                    tf.gather(record, order),
                    tf.gather(index, order),
                    tf.fill(tf.shape(order), epoch),
                )
            )

        stream = tf.data.Dataset.from_generator(
            entries,
            output_signature=(
                tf.TensorSpec([None], tf.string),
                tf.TensorSpec([None], tf.int64),
                tf.TensorSpec([None], tf.int64),
                tf.TensorSpec([], tf.int64),
            ),
        )
        # The next window is read while this one is used.
        examples = stream.flat_map(window).prefetch(1).unbatch()
        return examples.map(
            lambda record, index, epoch: self._parse(record) | {"index": index, "epoch": epoch},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def once(self, share: Share, start: int = 0, broken: Set[int] = _NONE) -> Any:
        import tensorflow as tf

        return (
            tf.data.TFRecordDataset(self._files[0])
            .shard(share.count, share.index)
            .skip(start)
            .map(self._parse, num_parallel_calls=tf.data.AUTOTUNE)
        )

    def all_labels(self) -> np.ndarray:
        examples = self.once(Share()).map(lambda example: example["label"]).batch(_WINDOW)
        return np.concatenate(list(examples.as_numpy_iterator()))

    def subset(self, indices: np.ndarray) -> IndexedSplit:
        """These images, encoded, in memory. Raises a UserError if they are too many for it."""
        self.check_subset(len(indices))
        wanted, images, labels = set(map(int, indices)), [], []
        for i, example in enumerate(self.once(Share()).as_numpy_iterator()):
            if i in wanted:
                images.append(example["image"])
                labels.append(example["label"])
        return IndexedSplit(
            np.asarray([*images, None], object)[:-1], np.asarray(labels, np.int32), self.classes
        )

    def check_subset(self, count: int) -> None:
        split = self.builder.info.splits[self.name]
        need = split.num_bytes / split.num_examples * count
        room = _MEMORY_FOR_SUBSETS * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > room:
            raise UserError(
                f"{count} images of {self.builder.name}/{self.name} take {need / 1e9:.1f} GB of "
                f"memory, and on this machine there are {room / 1e9:.1f} for them: prepare them as a "
                "data set of their own (such as imagenet2012_subset/10pct) and name it in data.name"
            )

    def divided(self, fraction: float, seed: int) -> tuple[Split, Split]:
        # Whole files: TFDS shuffles a data set before it divides it into files.
        lengths = self._files[1]
        files = np.arange(len(lengths)) if self.files is None else np.asarray(self.files)
        if len(files) < 2:
            raise UserError(
                f"{self.builder.name}/{self.name} has one file, so none can be held out for "
                "validation: prepare it with more shards"
            )
        part, rest = split_validation(files, fraction, seed)
        return (
            dataclasses.replace(self, files=tuple(files[part].tolist())),
            dataclasses.replace(self, files=tuple(files[rest].tolist())),
        )

    def entries(
        self, seed: int, batch_size: int, start_step: int, share: Share, broken: Set[int] = _NONE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter([(np.empty(0, np.int64), np.empty(0, np.int64))])  # known only by reading

    def stand_ins(self, broken: Set[int]) -> np.ndarray:
        return np.arange(self.count)

    def decode(self, image: Any) -> Any:
        return self.builder.info.features["image"].decode_example(image)

    def name_of(self, index: int) -> str:
        return f"{self.builder.name}/{self.name}, example {index}"

    def problem(self, index: int) -> str | None:
        return None  # TFDS has checked what it wrote

    def fingerprint(self) -> str:
        lengths = ",".join(map(str, self._files[1]))
        return f"{self.builder.info.full_name}/{self.name}:{lengths}"


def _windows(
    seed: int, lengths: np.ndarray, share: Share, passed: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (epoch, files [k], order [n]) of this process's windows, without end: which of the
    examples of these files come, in which order. Of the first window only what is left after
    `passed` examples; what lies before it is not read.

    Args:
      seed: of the run.
      lengths: examples of each file.
      share: this process's part of the files.
      passed: examples that this process has used.
    """
    epoch = 0
    while True:
        files = _own_files(seed, epoch, lengths, share)
        # The window of a file: how many full windows lie before it.
        number = (np.cumsum(lengths[files]) - lengths[files]) // _WINDOW
        for i in np.unique(number):
            members = files[number == i]
            n = int(lengths[members].sum())
            if passed < n:
                order = np.random.default_rng([seed, epoch, int(i)]).permutation(n)
                yield epoch, members, order[passed:]
                passed = n
            passed -= n
        epoch += 1


def reason_of(error: Any) -> str:
    """What a TensorFlow error says, without which node of which graph says it."""
    text = " ".join(str(error.message).split())
    return text.rpartition("}} ")[2].partition(" [Op:")[0].partition(" Condition x ")[0]


def _own_files(seed: int, epoch: int, lengths: np.ndarray, share: Share) -> np.ndarray:
    """This process's files of this epoch, in order."""
    return epoch_order(seed, epoch, len(lengths))[share.index :: share.count]


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: what to train on and, where there is one, what to test on."""

    train: Split
    test: Split | None


@functools.lru_cache(maxsize=1)  # training, then its probe, ask for the same data
def open_source(
    kind: str,
    *,
    name: str = "",
    path: str = "",
    test_path: str = "",
    train_split: str = "train",
    test_split: str = "test",
    folder_labels: bool = False,
    seed: int = 0,
) -> Source:
    """Opens a data set.

    Args:
      kind: "tfds": the TFDS data set `name` in the data folder `path` ("" is TFDS's own);
        "folder": every image below `path`, tested on those below `test_path` ("": none);
        "arrays": the .npz file `path`, see `arrays`;
        "synthetic": random images, for trying out speed and memory.
      train_split, test_split: of the TFDS data set.
      folder_labels: the first folder below `path` names the class.
      seed: of the synthetic images.

    Raises:
      UserError: the data set is not there or not usable.
    """
    if kind == "tfds":
        return _open_tfds(name, path, train_split, test_split)
    if kind == "folder":
        train = folder(path, folder_labels)
        test = folder(test_path, folder_labels, train.classes) if test_path else None
        return Source(train, test)
    if kind == "arrays":
        return arrays(path)
    if kind == "synthetic":
        return synthetic(seed)
    raise ValueError(f"unknown kind of source {kind!r}")


def folder(path: str, labels: bool, classes: tuple[str, ...] | None = None) -> IndexedSplit:
    """Every image file below `path`, sorted by path.

    Args:
      path: of the folder.
      labels: the first folder below `path` is an image's class.
      classes: their names, in order; None takes what is there, sorted.

    Raises:
      UserError: there is no folder, no image, an image in no class folder or in an unknown one.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {path!r}: expected a folder of images (data.path)")
    found = index(root)
    paths = np.asarray([os.path.join(root, path) for path in found.paths], str)
    if not len(paths):
        raise UserError(f"no image below {path!r}: looked for {', '.join(SUFFIXES)}")
    odd = [path for path in found.paths.tolist() if not _is_utf8(path)]
    if odd:
        raise UserError(
            f"{len(odd)} files below {path!r} have names that are not UTF-8, such as "
            f"{os.fsencode(odd[0])!r}: rename them"
        )
    if not labels:
        return IndexedSplit(paths, np.full(len(paths), -1, np.int32), sizes=found.sizes)
    parts = [pathlib.PurePath(path).parts for path in found.paths.tolist()]
    loose = [p for p, inside in zip(paths, parts, strict=True) if len(inside) == 1]
    if loose:
        raise UserError(
            f"{len(loose)} images lie in no class folder, such as {loose[0]}: move them, or set "
            "data.folder_labels=False"
        )
    owners = [inside[0] for inside in parts]
    if classes is None:
        classes = tuple(sorted(set(owners)))
    unknown = sorted(set(owners).difference(classes))
    if unknown:
        raise UserError(f"{path!r} has the classes {', '.join(unknown)}, which training has not")
    code = {name: i for i, name in enumerate(classes)}
    codes = np.asarray([code[o] for o in owners], np.int32)
    return IndexedSplit(paths, codes, classes, found.sizes)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # of a byte that Python keeps as half a character
        return False
    return True


def arrays(path: str) -> Source:
    """An .npz file: train_images uint8 [N, H, W, 1 or 3] and, if there, train_labels int [N],
    test_images, test_labels.
    """
    path = os.path.expanduser(path)
    if not pathlib.Path(path).is_file():
        raise UserError(f"no file {path!r}: expected an .npz file (data.path)")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; expected an .npz file of arrays"
        ) from error
    known = {"train_images", "train_labels", "test_images", "test_labels"}
    if "train_images" not in stored or stored.keys() - known:
        raise UserError(
            f"{path} holds {sorted(stored)}: expected train_images and any of {sorted(known)}"
        )
    classes = None
    if "train_labels" in stored:
        classes = tuple(str(c) for c in range(int(stored["train_labels"].max(initial=0)) + 1))
    train = in_memory(stored["train_images"], stored.get("train_labels"), classes)
    test = None
    if "test_images" in stored:
        test = in_memory(stored["test_images"], stored.get("test_labels"), classes)
        if test.image_shape[-1] != train.image_shape[-1]:
            raise UserError(
                f"{path}: test images have another number of channels than training ones"
            )
    return Source(train, test)


def in_memory(images, labels=None, classes: tuple[str, ...] | None = None) -> IndexedSplit:
    """A split of images uint8 [N, H, W, 1 or 3], with labels int [N] or none."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}: expected uint8 [N, H, W, 1 or 3]"
        )
    if len(images) == 0:
        raise UserError("there are no images: expected at least one")
    if labels is None:
        labels, classes = np.full(len(images), -1), None
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images: expected one "
            "integer each"
        )
    if np.all(labels == -1):  # TFDS's mark of an image without a label
        classes = None
    elif classes is not None and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(
            f"labels are {labels.min()} to {labels.max()}: expected 0 to {len(classes) - 1}"
        )
    return IndexedSplit(images, np.asarray(labels, np.int32), classes)


def synthetic(seed: int, count: int = 1024, size: int = 64, classes: int = 10) -> Source:
    """Random images, each a noisy copy of its class's random pattern, as arrays in memory."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (classes, size, size, 3))

    def split(n):
        labels = np.arange(n) % classes
        noise = rng.integers(-64, 65, (n, size, size, 3))
        images = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
        return in_memory(images, labels, tuple(str(c) for c in range(classes)))

    return Source(split(count), split(count // 4))


def _open_tfds(name: str, data_dir: str, train_split: str, test_split: str) -> Source:
    builder = _prepared_builder(name, data_dir)
    features = builder.info.features
    if not hasattr(features, "keys") or "image" not in features:
        raise UserError(
            f"the TFDS data set {name!r} has no feature 'image': expected an image data set"
        )
    return Source(
        _tfds_split(builder, train_split), _tfds_split(builder, test_split) if test_split else None
    )


def _prepared_builder(name: str, data_dir: str) -> Any:
    """The TFDS builder called `name`, downloaded and prepared if it was not yet."""
    import tensorflow_datasets as tfds

    import simclr_jax.data.digits  # noqa: F401  makes TFDS know it

    where = data_dir or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        near = difflib.get_close_matches(name, tfds.list_builders(), n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise UserError(f"no TFDS data set {name!r} (data.name){hint}") from error
    if not builder.data_path.exists():
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare()
        except Exception as error:  # any of many network, checksum and disk errors
            raise UserError(
                f"could not prepare the TFDS data set {name!r} in {where}: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}. Set data.path to a folder "
                "where it is prepared already"
            ) from error
    return builder


def _tfds_split(builder: Any, name: str) -> Split:
    splits = builder.info.splits
    if name not in splits:
        raise UserError(
            f"the TFDS data set {builder.name!r} has no split {name!r}: it has {', '.join(splits)}; "
            "see data.train_split and data.test_split, which may be '' for none"
        )
    features = builder.info.features
    labelled = "label" in features and hasattr(features["label"], "names")
    classes = tuple(features["label"].names) if labelled else None
    image = features["image"]
    shape = image.shape
    if len(shape) != 3 or shape[-1] not in (1, 3) or np.dtype(image.np_dtype) != np.uint8:
        raise UserError(
            f"the images of {builder.name!r} are {np.dtype(image.np_dtype)} {list(shape)}: expected "
            "uint8 [height, width, 1 or 3]"
        )
    if None not in shape and int(np.prod(shape)) * splits[name].num_examples <= _IN_MEMORY_BYTES:
        import tensorflow_datasets as tfds

        data = tfds.as_numpy(builder.as_dataset(split=name, batch_size=-1))
        return in_memory(data["image"], data["label"] if classes else None, classes)
    split = FilesSplit(builder, name, classes)
    if classes and int(next(iter(split.once(Share())))["label"]) < 0:
        return FilesSplit(builder, name, None)  # such as the unlabelled split of stl10
    return split
