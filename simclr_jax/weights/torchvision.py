"""Writes and reads a ResNet's weights under torchvision's names, which timm uses too, and writes the PyTorch
program that loads them.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from simclr_jax.encoders.resnet import POOL_PADDINGS, STAGES, STANDARDS, STEMS, ResNet
from simclr_jax.errors import UserError, one_line
from simclr_jax.files import quoted
from simclr_jax.weights.contents import (
    Path,
    Weights,
    filled,
    layers_in_order,
    network_of,
    norm_paths,
)

KIND = "torchvision or timm"

DEPTHS = (18, 34, 50, 101, 152)  # for which torchvision has a function, such as resnet18

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def torchvision_weights(variables: dict) -> dict[str, np.ndarray]:
    """Returns {name: float32 array}: the weights as torchvision.models.ResNet names and lays them out.

    Args:
      variables: {"params", "batch_stats"} of a `ResNet`; its width may be any, as `pytorch_loading` has
        torchvision's class build it.
    """
    found = jax.device_get(variables)
    return {
        name: np.ascontiguousarray(
            _to_torch(functools.reduce(lambda tree, key: tree[key], path, found))
        )
        for name, path in _paths(found["params"]).items()
    }


def _to_torch(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x  # [h, w, in, out] to [out, in, h, w]


def _paths(params: Mapping[str, Any]) -> dict[str, Path]:
    """Returns {torchvision's name of an array: its path in {"params", "batch_stats"}}. `params`: of a `ResNet`;
    only the names of the dicts matter.
    """
    paths: dict[str, Path] = {}
    for convolution, norm in zip(*layers_in_order(params), strict=True):
        names = _names_of(convolution)
        paths[f"{names[0]}.weight"] = ("params", *convolution, "kernel")
        own = norm_paths(norm)
        paths |= {f"{names[1]}.{theirs}": own[ours] for theirs, ours in _NORM.items()}
    return paths


def _names_of(convolution: Path) -> tuple[str, str]:
    """Returns torchvision's names of a convolution and of the BatchNorm after it."""
    if convolution == ("stem",):
        return "conv1", "bn1"
    place, layer = convolution
    stage, block = (int(number) for number in place.removeprefix("stage").split("_block"))
    holder = f"layer{stage}.{block - 1}"
    if layer == "shortcut":
        return f"{holder}.downsample.0", f"{holder}.downsample.1"
    number = int(layer.removeprefix("Conv_")) + 1
    return f"{holder}.conv{number}", f"{holder}.bn{number}"


def architecture(network: ResNet) -> dict[str, str]:
    """Returns the options that names and shapes of weights do not tell, for a file's description; see `convert`."""
    return {name: getattr(network, name) for name in ("stem", "pool_padding", "standardize")}


def read(path: epath.Path) -> Weights:
    """Reads a .safetensors file of torchvision's or timm's ResNets, or one that --mode=export wrote.

    The file does not say how the max-pool pads nor what is done to pixels: what this package wrote says so
    in its description, other files are taken to be torchvision's (padding on both sides, ImageNet's mean and
    deviation).

    Raises:
      UserError: the file is damaged, or is not of a ResNet of torchvision's form.
    """
    import safetensors

    try:
        with safetensors.safe_open(str(path), "np") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)[:200]}") from error
    return convert(weights, about)


def convert(weights: Mapping[str, np.ndarray], about: Mapping[str, str]) -> Weights:
    """Turns {torchvision's name: array} into weights of this package.

    Args:
      weights: the arrays.
      about: the result of `architecture`; an entry that is missing gets torchvision's value.

    Raises:
      UserError: a weight is missing, is one too many, or has another shape, or `about` says what no network is.
    """
    weights = {name: x for name, x in weights.items() if not name.endswith("num_batches_tracked")}
    unknown = {"standardize": "imagenet", "pool_padding": "symmetric"}
    known: dict[str, Iterable[str]] = {
        "stem": STEMS,
        "standardize": STANDARDS,
        "pool_padding": POOL_PADDINGS,
    }
    told = {name: about[name] for name in known if name in about}
    for name, value in told.items():
        if value not in set(known[name]):
            raise UserError(
                f"the file's description says {name}={value}: expected {' or '.join(known[name])}"
            )
    model = _model_of(weights) | unknown | told | {"head": "none"}
    network, abstract = network_of(model)
    ours = _paths(abstract["params"])
    values: dict[Path, np.ndarray] = {}
    names: dict[Path, str] = {}
    classifier = {}
    for name, x in weights.items():
        if name in ("fc.weight", "fc.bias"):
            classifier[name.removeprefix("fc.")] = np.asarray(x, np.float32)
            continue
        if name not in ours:
            raise UserError(
                f"{name} is one variable too many: {network.describe()} of torchvision has none such"
            )
        values[ours[name]] = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
        names[ours[name]] = name
    encoder = filled(abstract, values, names)
    dense = None
    if classifier:
        shapes = {name: x.shape for name, x in classifier.items()}
        outputs = shapes.get("bias", ())
        if len(outputs) != 1 or shapes.get("weight") != (*outputs, network.width):
            raise UserError(
                f"fc.weight and fc.bias are {shapes}: expected [C, {network.width}] and [C] for C classes"
            )
        dense = {"dense": {"kernel": classifier["weight"].T.copy(), "bias": classifier["bias"]}}
    classes = _classes(about, len(classifier["bias"])) if classifier else None
    return Weights(KIND, model, encoder, None, dense, {}, classes, _view(about))


def _classes(about: Mapping[str, str], count: int) -> list[str] | None:
    """Returns the names of `count` classes that --mode=export wrote into the description; None: there are none."""
    with contextlib.suppress(KeyError, ValueError):
        found = json.loads(about["classes"])
        if isinstance(found, list) and len(found) == count:
            return [str(name) for name in found]
    return None


# Options of an evaluation's view, see `EvaluationView.by_option`, with their groups.
_OF_VIEW = (
    "data.image_size",
    "data.eval_crop",
    "data.upright",
    "data.sample_bits",
    "views.antialias",
)


def _view(about: Mapping[str, str]) -> dict[str, Any]:
    """Returns {option: value} of the images that --mode=export wrote into the description; {}: there are none."""
    with contextlib.suppress(KeyError, ValueError):
        found = json.loads(about["view"])
        if isinstance(found, dict):
            named = {option: option.partition(".")[2] for option in _OF_VIEW}
            return {option: found[name] for option, name in named.items() if name in found}
    return {}


def _model_of(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Finds the network by names and shapes: {"name", "depth", "width", "stem", "project_shortcuts"}."""
    if "conv1.weight" not in weights:
        longer = [
            name for name in weights if name.endswith(".conv1.weight") and "layer" not in name
        ]
        prefix = longer[0].removesuffix("conv1.weight") if longer else ""
        more = (
            f"; write the file anew with names that do not begin with {prefix!r}" if prefix else ""
        )
        raise UserError(
            f"no conv1.weight: expected the names of torchvision's and timm's ResNets{more}"
        )
    blocks = [0, 0, 0, 0]
    for name in weights:
        if match := re.match(r"layer([1-4])\.(\d+)\.conv1\.weight", name):
            stage = int(match[1]) - 1
            blocks[stage] = max(blocks[stage], int(match[2]) + 1)
    bottleneck = "layer1.0.conv3.weight" in weights
    depths = {stages: depth for depth, stages in STAGES.items()}
    depth = depths.get(((blocks[0], blocks[1], blocks[2], blocks[3]), bottleneck))
    if depth is None:
        raise UserError(
            f"{blocks} blocks in the stages: expected those of a ResNet of depth {', '.join(map(str, STAGES))}"
        )
    first = weights["conv1.weight"].shape
    if len(first) != 4:
        raise UserError(f"conv1.weight is {list(first)}: expected the 4 dimensions of a 2-D kernel")
    channels, _, size, _ = first
    return {
        "name": "resnet",
        "depth": depth,
        "width": channels / 64,
        "stem": "imagenet" if size == 7 else "cifar",
        "project_shortcuts": not bottleneck and "layer1.0.downsample.0.weight" in weights,
    }


def pytorch_loading(
    network: ResNet, image_size: int, path: Any, weights: Mapping[str, np.ndarray] | None = None
) -> str:
    """Writes the PyTorch program that loads the weights, with every change that torchvision's model needs
    to compute what this encoder does at `image_size`.

    Args:
      network: the encoder.
      image_size: height and width of an image, pixels.
      path: the file.
      weights: those in the file; with "fc.weight" they are a classifier's.
    """
    fc = (weights or {}).get("fc.weight")
    blocks, bottleneck = STAGES[network.depth]
    block = f"torchvision.models.resnet.{'Bottleneck' if bottleneck else 'BasicBlock'}"
    lines = []
    dtype = jnp.dtype(network.dtype)
    if dtype != jnp.float32:
        lines.append(
            f"# Trained in {dtype}: here h is computed in float32, and differs by the rounding."
        )
    if network.depth in DEPTHS:
        model = f"torchvision.models.resnet{network.depth}()"
    else:
        model = f"torchvision.models.ResNet({block}, {list(blocks)})"
    lines += [
        "import torch, torchvision",
        "from safetensors.torch import load_file",
        "",
        f"model = {model}",
        "model.fc = torch.nn.Identity()"
        if fc is None
        else f"model.fc = torch.nn.Linear({fc.shape[1]}, {fc.shape[0]})",
    ]
    standard = STANDARDS[network.standardize]
    if standard is not None:
        mean, deviation = standard
        lines.append(f"mean, deviation = torch.tensor({mean}), torch.tensor({deviation})")
    size, stride, pool = STEMS[network.stem]
    channels = network.channels
    if (size, stride, channels) != (7, 2, 64):
        lines.append(
            f"model.conv1 = torch.nn.Conv2d(3, {channels}, {size}, {stride}, {size // 2}, bias=False)"
        )
    if channels != 64:  # torchvision's class has one width: its own method builds the stages anew
        lines += [
            f"model.bn1, model.inplanes = torch.nn.BatchNorm2d({channels}), {channels}",
            *(
                f"model.layer{i + 1} = model._make_layer({block}, {channels * 2**i}, {count}, "
                f"stride={1 if i == 0 else 2})"
                for i, count in enumerate(blocks)
            ),
        ]
    if network.project_shortcuts and not bottleneck:
        lines += [
            "model.layer1[0].downsample = torch.nn.Sequential(",
            f"    torch.nn.Conv2d({channels}, {channels}, 1, bias=False), torch.nn.BatchNorm2d({channels}))",
        ]
    if not pool:
        lines.append("model.maxpool = torch.nn.Identity()")
    elif network.pool_padding == "same" and -(-image_size // 2) % 2 == 0:
        # TensorFlow's SAME pads an even size by (0, 1), like a last window that hangs over, and an
        # odd one by (1, 1), as torchvision does.
        lines.append("model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)")
    return "\n".join(
        [
            *lines,
            f"model.load_state_dict(load_file({quoted(path)}))",
            *(
                ["images = (images - mean[:, None, None]) / deviation[:, None, None]"]
                if standard is not None
                else []
            ),
            f"{'h' if fc is None else 'logits'} = model.eval()(images)  # float32 [N, 3, H, W]",
        ]
    )
