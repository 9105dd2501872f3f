"""TensorFlow Datasets as a source: in memory up to 1 GB, else streamed from its record files, which
are TFRecord or ArrayRecord.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from simclr_jax.data.arrays import in_memory
from simclr_jax.data.label_sets import MOST_LABELS, LabelSets, mask_of, names_of
from simclr_jax.data.order import Share
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import CORES, Classes, ShardedSource, elements_of
from simclr_jax.data.split import DataSet, Split
from simclr_jax.data.streamed import StreamedSplit
from simclr_jax.errors import UserError, near_names, one_line

# A split of images of one shape is held in memory up to this size: any order is then free, and
# nothing is decoded twice.
_IN_MEMORY_BYTES = 2**30

# Records of an ArrayRecord file that are read together: some 7 MB of ImageNet.
_RECORDS_AT_ONCE = 64


class RecordFiles(ShardedSource):
    """The record files of a TFDS split, or of several, each a shard."""

    shard_name = "file"

    def __init__(self, builder: Any, split: str, classes: Classes, sets: LabelSets | None = None):
        """Takes a prepared TFDS builder, the name of a split, such as "train" or "train+validation", and its classes.

        `sets`: the classes are sets of labels; None: they are labels.
        """
        infos = [builder.info.splits[name] for name in _parts(split)]
        self._builder, self._split, self.classes, self._sets = builder, split, classes, sets
        self._paths = [str(path) for info in infos for path in info.filepaths]
        self.lengths = np.concatenate([np.asarray(i.shard_lengths, np.int64) for i in infos])
        self.title = f"{builder.name}/{split}"
        self.total_bytes = sum(info.num_bytes for info in infos)
        self.image_shape = builder.info.features["image"].shape
        self.is_shuffled = not builder.info.disable_shuffling

    def records(self, shard: Any) -> Any:
        import tensorflow as tf

        path = tf.gather(tf.constant(self._paths), shard)
        if _is_array_record(self._builder):
            several = tf.TensorSpec([None], tf.string)
            blocks = tf.data.Dataset.from_generator(_blocks, output_signature=several, args=(path,))
            return blocks.unbatch()
        return tf.data.TFRecordDataset(path)

    def _without_pixels(self, record: Any) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        return self._builder.info.features.deserialize_example(
            record, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def parse(self, record: Any) -> dict[str, Any]:
        import tensorflow as tf

        example = self._without_pixels(record)
        if self._sets is not None:
            label = self._sets.code(example)
        else:
            label = tf.cast(example["label"], tf.int32) if self.classes else tf.constant(-1)
        return {"image": example["image"], "label": label}

    def masks(self, labels: int) -> np.ndarray:
        """Returns the different masks of the sets of labels that occur, int64; see `LabelSets`.

        `labels`: the number of different labels.
        """
        import tensorflow as tf

        shards = tf.data.Dataset.range(len(self.lengths))
        # `enumerate` makes pairs: `map` would unpack a record that is a tuple into several arguments.
        records = shards.flat_map(self.records).enumerate()
        found = records.map(lambda _, r: mask_of(self._without_pixels(r), labels), CORES)
        return np.unique(list(elements_of(found, self.title))).astype(np.int64)

    def decode(self, image: Any, options: ReadOptions = ReadOptions()) -> Any:
        """Decodes as TFDS does, of whose images published accuracies are, and which turns none."""
        return self._builder.info.features["image"].decode_example(image)

    def fingerprint(self, shards: np.ndarray) -> str:
        lengths = ",".join(map(str, self.lengths[shards]))
        return f"{self._builder.info.full_name}/{self._split}:{lengths}"


def _parts(split: str) -> list[str]:
    """Returns the names of the splits in "train" or "train+validation"."""
    return split.split("+")


def _is_array_record(builder: Any) -> bool:
    return builder.info.file_format.value == "array_record"


def _blocks(path: bytes) -> Iterator[list[bytes]]:
    """Yields the records of an ArrayRecord file, some at a time, in order."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path.decode())
    count = reader.num_records()
    for start in range(0, count, _RECORDS_AT_ONCE):
        yield reader.read(start, min(start + _RECORDS_AT_ONCE, count))
    reader.close()


def open_data_set(data: Mapping[str, Any]) -> DataSet:
    """Opens the TFDS data set "name" in the folder "path" ("": TFDS's own), prepared if it was not.

    "train_split" and "test_split" name its splits, several joined by "+"; the latter may be "".

    Raises:
      UserError: there is no such data set or split, or its images are not uint8.
    """
    name = data["name"]
    builder = _prepared_builder(name, data["path"])
    features = builder.info.features
    if not hasattr(features, "keys") or "image" not in features:
        raise UserError(
            f"the TFDS data set {name!r} has no feature 'image': expected an image data set"
        )
    names = [data["train_split"], *([data["test_split"]] if data["test_split"] else [])]
    for name in names:
        _check_split(builder, name)
    if both := {*_parts(data["train_split"])} & {*_parts(data["test_split"])}:
        raise UserError(
            f"{', '.join(sorted(both))} is in both data.train_split={data['train_split']} and "
            f"data.test_split={data['test_split']}: test images would be trained on; set data.test_split='' to train on all "
            "images and evaluate elsewhere"
        )
    if labels := names_of(features):
        return _open_sets(builder, names, labels)
    found = [_open_split(builder, name) for name in names]
    return DataSet(found[0], found[1] if len(found) > 1 else None)


def _open_sets(builder: Any, names: list[str], labels: tuple[str, ...]) -> DataSet:
    """Opens splits whose images have several labels each."""
    if len(labels) > MOST_LABELS:
        raise UserError(
            f"the TFDS data set {builder.name!r} has {len(labels)} labels, several an image: expected at "
            f"most {MOST_LABELS}"
        )
    found = [RecordFiles(builder, name, None).masks(len(labels)) for name in names]
    every = np.unique(np.concatenate(found))
    sets = LabelSets(labels, every[every > 0])
    made = [StreamedSplit(RecordFiles(builder, name, sets.classes, sets)) for name in names]
    return DataSet(made[0], made[1] if len(made) > 1 else None, sets.members)


def _prepared_builder(name: str, data_dir: str) -> Any:
    """Returns the TFDS builder called `name`, downloaded and prepared if it was not yet."""
    import tensorflow_datasets as tfds

    import simclr_jax.data.digits  # noqa: F401  makes TFDS know it

    where = data_dir or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        hint = near_names(name, tfds.list_builders())
        raise UserError(f"no TFDS data set {name!r} (data.name){hint}") from error
    except AssertionError as error:  # of a version that there is not
        reason = one_line(error)
        raise UserError(f"no TFDS data set {name!r} (data.name): {reason}") from error
    if not builder.data_path.exists():
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare()
        except Exception as error:  # any of many network, checksum and disk errors
            # Another process may have prepared it meanwhile: a folder cannot be renamed to one that exists.
            if is_prepared(name, data_dir):
                return tfds.builder(name, data_dir=data_dir or None)
            text = one_line(error)
            reason = f"{type(error).__name__}: {text[:300]}"
            if "anual director" in text:
                reason = "TFDS does not download it, its archives have to be put there by hand, see its page in the catalogue"
            raise UserError(
                f"could not prepare the TFDS data set {name!r} in {where}: {reason}. Set data.path to a folder "
                "where it is prepared already; images of your own are data.source=folder, with data.path and "
                "data.folder_labels=True"
            ) from error
    return builder


def is_prepared(name: str, data_dir: str = "") -> bool:
    """Returns whether the TFDS data set called `name` lies in a folder, "": TFDS's own. Downloads nothing."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir or None).data_path.exists()
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError):
        return False  # this version of TFDS does not have it


def _check_split(builder: Any, name: str) -> None:
    """Raises a UserError if there is no such split, or it cannot be read."""
    splits, parts = builder.info.splits, _parts(name)
    for part in parts:
        if part not in splits:
            raise UserError(
                f"the TFDS data set {builder.name!r} has no split {part!r}: it has {', '.join(splits)}; "
                "see data.train_split and data.test_split, which take one, several joined by +, or '' for none"
            )
    if len(set(parts)) < len(parts):
        raise UserError(f"{name!r} names a split twice: expected each once")
    if _is_array_record(builder) and importlib.util.find_spec("array_record") is None:
        raise UserError(
            f"the TFDS data set {builder.name!r} is prepared as ArrayRecord, which the package array_record "
            "reads (pip install array_record; Linux): install it, or prepare the data as TFRecord"
        )
    image = builder.info.features["image"]
    if (
        len(image.shape) != 3
        or image.shape[-1] not in (1, 3)
        or np.dtype(image.np_dtype) != np.uint8
    ):
        raise UserError(
            f"the images of {builder.name!r} are {np.dtype(image.np_dtype)} {list(image.shape)}: expected "
            "uint8 [height, width, 1 or 3]"
        )


def _open_split(builder: Any, name: str) -> Split:
    splits = builder.info.splits
    features = builder.info.features
    labelled = "label" in features and hasattr(features["label"], "names")
    classes = tuple(features["label"].names) if labelled else None
    shape = features["image"].shape
    if None not in shape and int(np.prod(shape)) * splits[name].num_examples <= _IN_MEMORY_BYTES:
        whole = _all_examples(builder, name)
        return in_memory(whole["image"], whole["label"] if classes else None, classes)
    split = StreamedSplit(RecordFiles(builder, name, classes))
    if classes and not _has_labels(split):  # such as the unlabelled split of stl10
        return StreamedSplit(RecordFiles(builder, name, None))
    return split


def _all_examples(builder: Any, split: str) -> Mapping[str, np.ndarray]:
    """Reads a split of images of one shape: {"image": uint8 [N, H, W, C], "label": int [N], where there is one}. Other
    features may vary in length, or hold features of their own.
    """
    parts = [_examples_of_part(builder, part) for part in _parts(split)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _examples_of_part(builder: Any, split: str) -> Mapping[str, np.ndarray]:
    import tensorflow_datasets as tfds

    names = {"image", "label"} & set(builder.info.features)
    if _is_array_record(builder):
        examples = [{name: x[name] for name in names} for x in builder.as_data_source(split=split)]
        return {name: np.stack([x[name] for x in examples]) for name in names}
    wanted = tfds.decode.PartialDecoding(dict.fromkeys(names, True))
    read = builder.as_dataset(split=split, decoders=wanted)
    whole = read.batch(builder.info.splits[split].num_examples)
    return next(elements_of(whole, f"{builder.name}/{split}"))


def _has_labels(split: StreamedSplit) -> bool:
    """Reads records until one has a label."""
    examples = split.once(Share()).map(lambda example: example["label"])
    return any(label >= 0 for label in elements_of(examples, split.source.title))
