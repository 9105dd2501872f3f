"""The contents of a file of weights, in the terms of this package; and filling a network's tree with them."""

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from simclr_jax.encoders import init_encoder
from simclr_jax.encoders.resnet import ResNet
from simclr_jax.encoders.sk_resnet import SkResNet
from simclr_jax.errors import UserError

Path = tuple[str, ...]


class Weights(NamedTuple):
    """Weights of an encoder f, and of what sat on it.

    Attributes:
      kind: the program that wrote the file, in words.
      model: {"name", "depth", ...}: options of the group "model" that differ from their defaults.
      encoder: {"params", "batch_stats"} of f, float32 numpy arrays.
      head: {"params", "batch_stats"} of the projection head; None: the file has none.
      classifier: {"dense": {"kernel" [D, C], "bias" [C]}}; None: the file has none.
      skipped: how many variables of which kind were not taken, such as {"ema_model": 270}.
      classes: names of the classifier's classes, in order; None: the file does not name them.
      view: {"data.image_size", ...}: options of the images that the encoder takes; {}: the file does not say.
    """

    kind: str
    model: dict[str, Any]
    encoder: dict
    head: dict | None
    classifier: dict | None
    skipped: dict[str, int]
    classes: list[str] | None = None
    view: Mapping[str, Any] = MappingProxyType({})


_NETWORKS = {"resnet": ResNet, "sk_resnet": SkResNet}


def network_of(model: Mapping[str, Any]) -> tuple[ResNet, dict]:
    """Returns the network of `Weights.model`, in float32, and the shapes of its {"params", "batch_stats"}."""
    network = _NETWORKS[model["name"]](
        depth=model["depth"],
        channel_factor=model["width"],
        stem=model["stem"],
        project_shortcuts=model["project_shortcuts"],
    )
    start = functools.partial(init_encoder, network, 224)  # no shape depends on the images'
    return network, jax.eval_shape(start, jax.random.key(0))


def filled(abstract: Any, values: Mapping[Path, np.ndarray], names: Mapping[Path, str]) -> Any:
    """Returns a tree like `abstract` with these values as its arrays, float32.

    Args:
      abstract: nested dicts of `jax.ShapeDtypeStruct`.
      values: path in the tree -> array.
      names: path -> what the file calls it, for errors.

    Raises:
      UserError: an array is missing, is one too many, or has another shape.
    """
    wanted = {
        tuple(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    for path in values:
        if path not in wanted:
            raise UserError(
                f"{names[path]} is one variable too many: the network found has no place for it"
            )
    tree: dict = {}
    for path, leaf in wanted.items():
        if path not in values:
            raise UserError(f"no variable for {'/'.join(path)}: expected one of shape {leaf.shape}")
        if values[path].shape != leaf.shape:
            raise UserError(
                f"{names[path]} has shape {values[path].shape}: expected {leaf.shape} for the network found"
            )
        holder = tree
        for key in path[:-1]:
            holder = holder.setdefault(key, {})
        holder[path[-1]] = np.asarray(values[path], np.float32)
    return tree


def norm_paths(where: Path) -> dict[str, Path]:
    """Returns {"scale", "bias", "mean", "var"}: the paths of a BatchNorm's arrays in {"params", "batch_stats"}."""
    return {
        "scale": ("params", *where, "scale"),
        "bias": ("params", *where, "bias"),
        "mean": ("batch_stats", *where, "mean"),
        "var": ("batch_stats", *where, "var"),
    }


def layers_in_order(params: Mapping[str, Any]) -> tuple[list[Path], list[Path]]:
    """Lists the paths of a ResNet's convolutions and of its BatchNorms as the published code creates them: the
    stem, then each block, in it the shortcut first.

    Args:
      params: parameters of a `ResNet` or an `SkResNet`; only the names of the dicts matter.
    """
    convolutions: list[Path] = []
    norms: list[Path] = []

    def add(*pairs: tuple[Path, Path | None]) -> None:
        for convolution, norm in pairs:
            convolutions.append(convolution)
            if norm is not None:
                norms.append(norm)

    stems = sorted(name for name in params if name.startswith("stem") and "norm" not in name)
    add(*(((stem,), (f"{stem}_norm",)) for stem in stems))
    for name in _blocks(params):
        block = params[name]
        if "shortcut" in block:
            add(((name, "shortcut"), (name, "shortcut_norm")))
        if "select" in block:
            inside = (name, "select")
            add(((name, "Conv_0"), (name, "BatchNorm_0")))
            add(((*inside, "kernels"), (*inside, "kernels_norm")))
            add(((*inside, "mix_in"), (*inside, "mix_norm")), ((*inside, "mix_out"), None))
            add(((name, "Conv_1"), (name, "BatchNorm_1")))
        else:
            count = sum(layer.startswith("Conv_") for layer in block)
            add(*(((name, f"Conv_{i}"), (name, f"BatchNorm_{i}")) for i in range(count)))
    return convolutions, norms


def _blocks(params: Iterable[str]) -> list[str]:
    def place(name: str) -> list[int]:
        return [int(x) for x in name.removeprefix("stage").split("_block")]

    return sorted((name for name in params if name.startswith("stage")), key=place)
