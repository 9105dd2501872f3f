"""A ResNet's weights under torchvision's names, and the PyTorch program that loads them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.encoders.resnet import STAGES, STEMS, ResNet


def torchvision_weights(network: ResNet, variables: dict) -> dict[str, np.ndarray]:
    """Returns {name: float32 array}: the weights as torchvision.models.ResNet names and lays them out.

    Args:
      network: the encoder; its width may be any, as `pytorch_loading` has torchvision's class build it.
      variables: {"params", "batch_stats"} of the network.
    """
    params, statistics = jax.device_get((variables["params"], variables["batch_stats"]))
    blocks, _ = STAGES[network.depth]
    weights = {"conv1.weight": _filters(params["stem"])}
    weights |= _norm("bn1", params["stem_norm"], statistics["stem_norm"])
    for stage, count in enumerate(blocks, 1):
        for index in range(count):
            ours, theirs = f"stage{stage}_block{index + 1}", f"layer{stage}.{index}"
            block, seen = params[ours], statistics[ours]
            for i in range(sum(name.startswith("Conv_") for name in block)):
                norm = f"BatchNorm_{i}"
                weights[f"{theirs}.conv{i + 1}.weight"] = _filters(block[f"Conv_{i}"])
                weights |= _norm(f"{theirs}.bn{i + 1}", block[norm], seen[norm])
            if "shortcut" in block:
                weights[f"{theirs}.downsample.0.weight"] = _filters(block["shortcut"])
                norm = "shortcut_norm"
                weights |= _norm(f"{theirs}.downsample.1", block[norm], seen[norm])
    return weights


def _filters(convolution: dict) -> np.ndarray:
    # [h, w, in, out] to [out, in, h, w]
    return np.ascontiguousarray(convolution["kernel"].transpose(3, 2, 0, 1))


def _norm(name: str, params: dict, statistics: dict) -> dict[str, np.ndarray]:
    return {
        f"{name}.weight": params["scale"],
        f"{name}.bias": params["bias"],
        f"{name}.running_mean": statistics["mean"],
        f"{name}.running_var": statistics["var"],
    }


def pytorch_loading(network: ResNet, image_size: int, path: Any) -> str:
    """Writes the PyTorch program that loads the weights, with every change that torchvision's model needs
    to compute what this encoder does at `image_size`.
    """
    blocks, bottleneck = STAGES[network.depth]
    block = f"torchvision.models.resnet.{'Bottleneck' if bottleneck else 'BasicBlock'}"
    lines = []
    dtype = jnp.dtype(network.dtype)
    if dtype != jnp.float32:
        lines.append(
            f"# Trained in {dtype}: here h is computed in float32, and differs by the rounding."
        )
    if network.depth in (18, 34, 50, 101, 152):
        model = f"torchvision.models.resnet{network.depth}()"
    else:
        model = f"torchvision.models.ResNet({block}, {list(blocks)})"
    lines += [
        "import torch, torchvision",
        "from safetensors.torch import load_file",
        "",
        f"model = {model}",
        "model.fc = torch.nn.Identity()",
    ]
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
    if not pool:
        lines.append("model.maxpool = torch.nn.Identity()")
    elif network.pool_padding == "same" and -(-image_size // 2) % 2 == 0:
        # TensorFlow's SAME pads an even size by (0, 1), like a last window that hangs over, and an
        # odd one by (1, 1), as torchvision does.
        lines.append("model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)")
    return "\n".join(
        [
            *lines,
            f'model.load_state_dict(load_file("{path}"))',
            "h = model.eval()(images)  # float32 [N, 3, H, W]",
        ]
    )
