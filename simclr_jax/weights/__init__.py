"""Weights that other programs wrote, and weights for them. To add a kind of file, write its reader in a
file of its own, and a row in `READERS`.

Nothing of a file is executed, and no pickle is read.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from simclr_jax.errors import UserError
from simclr_jax.files import in_bucket, located
from simclr_jax.weights import published, tensorflow, torchvision
from simclr_jax.weights.contents import Weights


class Reader(NamedTuple):
    """Reads one kind of file.

    Attributes:
      recognises: path -> whether it is such a file; looks at names only.
      read: path -> its weights. Raises a UserError for what does not fit.
    """

    recognises: Callable[[epath.Path], bool]
    read: Callable[[epath.Path], Weights]


READERS = {
    "TensorFlow checkpoint": Reader(
        lambda path: tensorflow.prefix_of(path) is not None,
        lambda path: published.convert(tensorflow.read(path)),
    ),
    "safetensors": Reader(lambda path: path.suffix == ".safetensors", torchvision.read),
}


def recognised(path: str) -> str | None:
    """Returns the kind of the file at `path`, a row of READERS; None: none of them."""
    file = located(path)
    return next((name for name, reader in READERS.items() if reader.recognises(file)), None)


def read(path: str) -> Weights:
    """Reads the weights of another program.

    Raises:
      UserError: there is nothing at `path`, it lies in a bucket, it is of no known kind, or a weight is missing,
        is one too many, has another shape than expected, or is not finite.
    """
    if in_bucket(path):
        raise UserError(
            f"{path}: expected a local path of weights that other programs wrote; gcloud storage cp copies them "
            "from a bucket"
        )
    file = located(path)
    kind = recognised(path)
    if kind is None:
        if (file / "checkpoints").exists():
            raise UserError(
                f"{path} is a workdir, which needs no import: give it as --workdir, or as model.init_from to begin with "
                "its weights"
            )
        what = "is none of these" if file.exists() else "does not exist"
        hint = ""
        if path.endswith((".pth", ".pt", ".bin", ".ckpt.tar", ".pkl")):
            hint = "; a pickle can run any program when it is read: save its state_dict by "
            hint += "safetensors.torch.save_file"
        raise UserError(
            f"{path} {what}: expected a TensorFlow checkpoint (its prefix, its folder, or a SavedModel's "
            f"folder) or a .safetensors file of torchvision's or timm's ResNets{hint}"
        )
    found = READERS[kind].read(file)
    _check_finite(path, found)
    return found


def _check_finite(path: str, weights: Weights) -> None:
    """Raises a UserError if a weight is not a finite number."""
    parts = {"encoder": weights.encoder, "head": weights.head, "classifier": weights.classifier}
    for place, array in jax.tree_util.tree_leaves_with_path(parts):
        if not np.isfinite(array).all():
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise UserError(
                f"{path} is damaged: of {name}, {np.sum(~np.isfinite(array))} numbers are not finite"
            )
