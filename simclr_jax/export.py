"""--mode=export: the encoder for programs that do not have this package.

Only what computes the same numbers is written. What another program has to change to get them is
said, and written into the file where it has a place for it.
"""

import functools
import os
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from simclr_jax.checkpoint import read_newest
from simclr_jax.console import say
from simclr_jax.encoder import Encoder, read_encoder
from simclr_jax.errors import UserError
from simclr_jax.record import check_encoder
from simclr_jax.resnet import STAGES, STEMS, ResNet

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(config: ConfigDict, workdir: str, format: str, output: str | None = None) -> None:
    """Writes the newest encoder of a workdir, or of a checkpoint folder, and says how to load it.

    Args:
      config: of the run; its data.image_size is that of the images the export takes.
      workdir: or a checkpoint folder.
      format: one of FORMATS.
      output: the file, or for "savedmodel" the folder; None: WORKDIR/encoder.FORMAT.

    Raises:
      UserError: the format cannot hold this encoder, it is not of the configuration's model, or the
        output cannot be written.
    """

    def read(checkpoint: epath.Path) -> Encoder:
        check_encoder(config, checkpoint)
        return read_encoder(checkpoint)

    encoder = read_newest(workdir, read)
    encoder.image_size = config.data.image_size
    path = epath.Path(os.path.expanduser(output or os.path.join(workdir, f"encoder.{format}")))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        loading = FORMATS[format](encoder, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    say(f"the encoder of step {encoder.step}, {encoder.width} numbers an image: {path}")
    say(f"\n{loading}\n")
    say("Images are numbers in [0, 1]: divided by 255, and not standardised.")


def _write_safetensors(encoder: Encoder, path: epath.Path) -> str:
    """PyTorch's layout under torchvision's names."""
    # Imported here: nothing else needs it.
    from safetensors.numpy import save

    loading = pytorch_loading(encoder.network, encoder.image_size, path)
    metadata = {
        "format": "pt",
        "loading": loading,
        "images": "float32 [N, 3, H, W] in [0, 1], not standardised",
        "step": str(encoder.step),
    }
    path.write_bytes(save(torchvision_weights(encoder.network, encoder.variables), metadata))
    return loading


def torchvision_weights(network: ResNet, variables: dict) -> dict[str, np.ndarray]:
    """{name: float32 array}: the weights as torchvision.models.ResNet names and lays them out.

    Args:
      network: of width 1.
      variables: {"params", "batch_stats"} of it.

    Raises:
      UserError: torchvision has no such network.
    """
    if network.width != 1:
        raise UserError(
            f"torchvision's ResNet has no width of {network.width:g} times: use "
            "--format=stablehlo or --format=savedmodel"
        )
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
    """The PyTorch program that loads the weights, with every change that torchvision's model needs
    to compute what this encoder does at `image_size`.
    """
    blocks, bottleneck = STAGES[network.depth]
    lines = []
    dtype = jnp.dtype(network.dtype)
    if dtype != jnp.float32:
        lines.append(
            f"# Trained in {dtype}: here h is computed in float32, and differs by the rounding."
        )
    if network.depth in (18, 34, 50, 101, 152):
        model = f"torchvision.models.resnet{network.depth}()"
    else:
        block = "Bottleneck" if bottleneck else "BasicBlock"
        model = f"torchvision.models.ResNet(torchvision.models.resnet.{block}, {list(blocks)})"
    lines += [
        "import torch, torchvision",
        "from safetensors.torch import load_file",
        "",
        f"model = {model}",
        "model.fc = torch.nn.Identity()",
    ]
    size, stride, pool = STEMS[network.stem]
    if (size, stride) != (7, 2):
        lines.append(
            f"model.conv1 = torch.nn.Conv2d(3, 64, {size}, {stride}, {size // 2}, bias=False)"
        )
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


def _write_stablehlo(encoder: Encoder, path: epath.Path) -> str:
    """A program with its weights, for any number of images of the size it was trained on."""
    size = encoder.image_size
    (n,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, size, size, 3), jnp.float32)
    variables = jax.device_get(encoder.variables)
    program = jax.jit(lambda images: _represent(encoder.network, variables, images))
    path.write_bytes(jax.export.export(program, platforms=_PLATFORMS)(images).serialize())
    return (
        "import jax.export, pathlib\n\n"
        f'encoder = jax.export.deserialize(pathlib.Path("{path}").read_bytes())\n'
        f"h = encoder.call(images)  # float32 [N, {size}, {size}, 3]"
    )


def _write_savedmodel(encoder: Encoder, path: epath.Path) -> str:
    """The same for TensorFlow, which runs the program by its own XLA."""
    # Imported here: only this format needs TensorFlow.
    import tensorflow as tf
    from jax.experimental import jax2tf

    tf.config.set_visible_devices([], "GPU")
    size = encoder.image_size
    convert = functools.partial(
        jax2tf.convert, with_gradient=False, native_serialization_platforms=_PLATFORMS
    )
    represent = convert(
        functools.partial(_represent, encoder.network),
        polymorphic_shapes=[None, f"(n, {size}, {size}, 3)"],
    )
    module = tf.Module()
    # Variables: a graph with its weights as constants may not pass 2 GB.
    module.weights = jax.tree.map(tf.Variable, jax.device_get(encoder.variables))
    specification = tf.TensorSpec([None, size, size, 3], tf.float32, "images")
    module.__call__ = tf.function(
        lambda images: represent(module.weights, images),
        input_signature=[specification],
        autograph=False,
    )
    tf.saved_model.save(module, str(path), signatures=module.__call__)
    return (
        "import tensorflow as tf\n\n"
        f'encoder = tf.saved_model.load("{path}")\n'
        f"h = encoder(images)  # float32 [N, {size}, {size}, 3]"
    )


def _represent(network: ResNet, variables: dict, images):
    return network.apply(variables, images, train=False)


FORMATS = {
    "safetensors": _write_safetensors,
    "stablehlo": _write_stablehlo,
    "savedmodel": _write_savedmodel,
}
