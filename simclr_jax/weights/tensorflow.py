"""Reading the variables of TensorFlow checkpoints, and of SavedModels without running them."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from simclr_jax.errors import UserError, one_line
from simclr_jax.files import in_bucket

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def prefix_of(path: epath.Path) -> epath.Path | None:
    """Finds the prefix of a checkpoint's files, PREFIX.index and PREFIX.data-*.

    Args:
      path: the prefix, a folder with one checkpoint (of several, the newest: the one with the highest
        number), or the folder of a SavedModel.

    Returns:
      the prefix; None: there is no checkpoint.
    """
    path = path.absolute() if not in_bucket(path) else path  # "." has no name
    if path.suffix == ".index":
        path = path.with_suffix("")
    if path.name and path.with_name(f"{path.name}.index").exists():
        return path
    if not path.is_dir():
        return None
    if (path / "variables" / "variables.index").exists():
        return path / "variables" / "variables"
    files = [file for file in path.iterdir() if file.suffix == ".index"]
    found = [file.with_name(file.name.removesuffix(".index")) for file in files]
    return max(found, key=_number, default=None)


def _number(prefix: epath.Path) -> int:
    digits = prefix.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def read(path: epath.Path) -> Mapping[str, np.ndarray]:
    """Reads {name: array}: every variable under the name it had in the program that saved it.

    An object checkpoint (TensorFlow 2) keys its variables by the objects that hold them; their names lie
    beside them in its graph of objects.

    Raises:
      UserError: TensorFlow is missing, or the files cannot be read.
    """
    try:
        import tensorflow as tf
        from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
    except ImportError as error:
        raise UserError(
            f"{path} is a TensorFlow checkpoint, and reading it needs TensorFlow: pip install tensorflow"
        ) from error
    try:
        reader = tf.train.load_checkpoint(str(prefix_of(path)))
        keys = list(reader.get_variable_to_shape_map())
        names = {key: key for key in keys}
        if _GRAPH in keys:
            graph = TrackableObjectGraph.FromString(reader.get_tensor(_GRAPH))
            names = {
                attribute.checkpoint_key: _name_of(attribute)
                for node in graph.nodes
                for attribute in node.attributes
            }
        # Counters, for instance, may share a name: each then has its key instead, so that none replaces another.
        count = collections.Counter(names.values())
        names = {key: name if count[name] == 1 else key for key, name in names.items()}
        return {name: reader.get_tensor(key) for key, name in names.items()}
    except Exception as error:  # whatever a damaged file may lead to
        raise UserError(f"{path} cannot be read: {one_line(error)[:200]}") from error


def _name_of(attribute: Any) -> str:
    """Returns the name of a variable. An optimizer's arrays have the name of the variable they belong to, so
    their key is returned instead.
    """
    is_slot = "/.OPTIMIZER_SLOT/" in attribute.checkpoint_key
    return attribute.checkpoint_key if is_slot else attribute.full_name or attribute.checkpoint_key
