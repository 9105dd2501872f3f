"""The checkpoints of google-research/simclr: SimCLR (TF1), SimCLR v2 (TF1) and both by TF2.

Names: `base_model/conv2d_7/kernel` (TF1) or `resnet/.../conv2d_7/kernel` (TF2), and so with
batch_normalization; `head_contrastive/nl_1/...` or `projection_head/nl_1/...`; `head_supervised/...`. The
numbers count the layers in the order in which the program made them, which is
`contents.layers_in_order`; they start above zero where the program had made other layers before.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from simclr_jax.encoders.heads import ProjectionHead
from simclr_jax.encoders.resnet import STAGES
from simclr_jax.errors import UserError
from simclr_jax.training.state import init_head
from simclr_jax.weights.contents import (
    Path,
    Weights,
    filled,
    layers_in_order,
    network_of,
    norm_paths,
)

KIND = "google-research/simclr"

_ENCODER = r"(?:base_model|resnet[^/]*)/(?:.*/)?"
_HEAD = r"(?:head_contrastive|projection_head)/nl_(?P<layer>\d+)/(?:.*/)?"
_NORM = r"(?:sync_)?batch_normalization(?:_(?P<number>\d+))?/"
_NORM_ARRAY = r"(?P<array>gamma|beta|moving_mean|moving_variance)$"
_PARTS = {
    "convolution": re.compile(rf"{_ENCODER}conv2d(?:_(?P<number>\d+))?/(?P<array>kernel)$"),
    "norm": re.compile(_ENCODER + _NORM + _NORM_ARRAY),
    "head dense": re.compile(_HEAD + r"dense(?:_\d+)?/(?P<array>kernel)$"),
    "head norm": re.compile(_HEAD + _NORM + _NORM_ARRAY),
    "classifier": re.compile(
        r"head_supervised/linear_layer/dense(?:_\d+)?/(?P<array>kernel|bias)$"
    ),
}
_OURS = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}

# Not taken: the network with averaged weights that made the keys of v2's queue of negatives, the optimizer's
# momentum, and counters.
_SKIPPED = {
    "ema_model": re.compile(r"(^|/)ema_model/"),
    "momentum": re.compile(r"/Momentum(_\d+)?$|/\.OPTIMIZER_SLOT/|(^|/)optimizer/", re.I),
    "counters": re.compile(
        r"^(global_step|save_counter|Variable(_\d+)?|_CHECKPOINTABLE_OBJECT_GRAPH)$"
    ),
}


class _Layer(NamedTuple):
    """One layer's arrays, {our name of the array: (the file's name, the array)}."""

    number: int
    arrays: dict[str, tuple[str, np.ndarray]]


def convert(variables: Mapping[str, np.ndarray]) -> Weights:
    """Turns the variables of a published checkpoint, {name: array}, into weights of this package.

    Depth, width and selective kernels follow from the number of layers and their shapes.

    Raises:
      UserError: a variable is missing, is one too many, has another shape, or belongs to no network that
        the published code makes.
    """
    parts, skipped = _sorted_out(variables)
    if not parts["convolution"]:
        raise UserError(
            "no convolution of an encoder among the variables (base_model/conv2d/kernel or "
            "resnet/.../conv2d/kernel): expected a checkpoint of google-research/simclr"
        )
    model = _model_of([layer.arrays["kernel"][1].shape for layer in parts["convolution"]])
    network, abstract = network_of(model)
    convolutions, norms = layers_in_order(abstract["params"])
    if len(parts["norm"]) != len(norms):
        raise UserError(
            f"{len(parts['norm'])} BatchNorms beside {len(convolutions)} convolutions: expected {len(norms)} "
            f"for {network.describe()}"
        )
    values: dict[Path, np.ndarray] = {}
    names: dict[Path, str] = {}
    for where, layer in zip(convolutions, parts["convolution"], strict=True):
        _put(values, names, {"kernel": ("params", *where, "kernel")}, layer)
    for where, layer in zip(norms, parts["norm"], strict=True):
        _put(values, names, norm_paths(where), layer)
    head, head_options = _head(parts, network.width)
    classifier = _classifier(parts["classifier"], network.width)
    encoder = filled(abstract, values, names)
    return Weights(KIND, model | head_options, encoder, head, classifier, skipped)


def _sorted_out(
    variables: Mapping[str, np.ndarray],
) -> tuple[dict[str, list[_Layer]], dict[str, int]]:
    """Sorts the variables into parts, each a list of layers by ascending number.

    Returns:
      {part: layers}, and {kind: variables skipped}.
    """
    found: dict[str, dict[int, dict]] = {part: {} for part in _PARTS}
    skipped: collections.Counter[str] = collections.Counter()
    for name, array in variables.items():
        why = next((kind for kind, pattern in _SKIPPED.items() if pattern.search(name)), None)
        if why:
            skipped[why] += 1
            continue
        for part, pattern in _PARTS.items():
            if match := pattern.match(name):
                groups = match.groupdict()
                number = int(groups.get("layer") or groups.get("number") or 0)
                ours = _OURS.get(groups["array"], groups["array"])
                arrays = found[part].setdefault(number, {})
                if ours in arrays:
                    raise UserError(f"{name} and {arrays[ours][0]} are one variable twice")
                arrays[ours] = name, array
                break
        else:
            raise UserError(
                f"{name} is one variable too many: it is of no part of a network of google-research/simclr"
            )
    layers = {part: [_Layer(n, found[part][n]) for n in sorted(found[part])] for part in found}
    return layers, dict(skipped)


def _put(values: dict, names: dict, paths: Mapping[str, Path], layer: _Layer) -> None:
    for ours, (name, array) in layer.arrays.items():
        values[paths[ours]], names[paths[ours]] = array, name


def _model_of(shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Finds the network of the published code that has these kernels [h, w, in, out], in order.

    Returns:
      {"name", "depth", "width", "stem", "project_shortcuts", "pool_padding"}.
    """
    for name in ("resnet", "sk_resnet"):
        for depth, (blocks, bottleneck) in STAGES.items():
            for stem in ("imagenet", "cifar"):
                in_stem = 3 if (name, stem) == ("sk_resnet", "imagenet") else 1
                in_block = 5 if name == "sk_resnet" else 2 + bottleneck
                fits = len(shapes) == in_stem + in_block * sum(blocks) + len(blocks)
                if name == "resnet":  # one convolution in both stems: 3x3 or 7x7
                    fits &= (shapes[0][0] == 3) == (stem == "cifar")
                else:
                    fits &= bottleneck
                if not fits:
                    continue
                return {
                    "name": name,
                    "depth": depth,
                    "width": shapes[in_stem - 1][-1] / 64,
                    "stem": stem,
                    "pool_padding": "same",
                    "project_shortcuts": not bottleneck,
                }
    raise UserError(
        f"{len(shapes)} convolutions: no network of google-research/simclr has as many "
        "(53 ResNet-50, 104 ResNet-101, 155 ResNet-152; with selective kernels 87, 172, 257; 21 and 37 ResNet-18 "
        "and 34)"
    )


def _head(parts: Mapping[str, list[_Layer]], width: int) -> tuple[dict | None, dict[str, Any]]:
    """Returns {"params", "batch_stats"} of the projection head, and the options "model.head*"."""
    denses, norms = parts["head dense"], parts["head norm"]
    if not denses:
        return None, {"head": "none"}
    kernel = denses[-1].arrays["kernel"][1]
    network = ProjectionHead("nonlinear", len(denses), kernel.shape[-1])
    abstract = jax.eval_shape(lambda key: init_head(network, width, key), jax.random.key(0))
    values: dict[Path, np.ndarray] = {}
    names: dict[Path, str] = {}
    for layer in denses:
        _put(values, names, {"kernel": ("params", f"dense{layer.number + 1}", "kernel")}, layer)
    for layer in norms:
        _put(values, names, norm_paths((f"norm{layer.number + 1}",)), layer)
    options = {"head": "nonlinear", "head_layers": len(denses), "head_width": kernel.shape[-1]}
    return filled(abstract, values, names), options


def _classifier(layers: list[_Layer], width: int) -> dict | None:
    """Returns {"dense": {"kernel", "bias"}} of the supervised classifier; None: there is none."""
    if not layers:
        return None
    kernel = next((x.arrays["kernel"][1] for x in layers if "kernel" in x.arrays), np.zeros((0, 0)))
    abstract = {
        "dense": {
            "kernel": jax.ShapeDtypeStruct((width, kernel.shape[-1]), np.float32),
            "bias": jax.ShapeDtypeStruct((kernel.shape[-1],), np.float32),
        }
    }
    values: dict[Path, np.ndarray] = {}
    names: dict[Path, str] = {}
    paths = {"kernel": ("dense", "kernel"), "bias": ("dense", "bias")}
    for layer in layers:
        _put(values, names, paths, layer)
    return filled(abstract, values, names)
