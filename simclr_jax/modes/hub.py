"""The folder of a Hugging Face repository, from which timm loads the encoder or the classifier."""

import json

import jax
import numpy as np
from etils import epath

from simclr_jax.console import say
from simclr_jax.encoders.resnet import STANDARDS, ResNet
from simclr_jax.errors import UserError
from simclr_jax.files import quoted, replacing, write_json, write_text
from simclr_jax.pretrained import Classifier, Encoder
from simclr_jax.weights.torchvision import DEPTHS, architecture, torchvision_weights


def torch_weights(encoder: Encoder) -> tuple[ResNet, dict[str, np.ndarray]]:
    """Returns the ResNet of an encoder or a classifier, and its weights under torchvision's names. A classifier
    on a layer of the projection head is not among them.

    Raises:
      UserError: torchvision has no such network.
    """
    network, variables = encoder.network, encoder.variables
    classifier = None
    if isinstance(encoder, Classifier):
        if not network.layer:
            classifier = jax.device_get(variables["params"]["classifier"]["dense"])
        variables = {kind: variables[kind]["encoder"] for kind in ("params", "batch_stats")}
        network = network.encoder
    if type(network) is not ResNet:
        raise UserError(
            f"torchvision and timm have no {network.describe()}: use --format=stablehlo or --format=savedmodel"
        )
    weights = torchvision_weights(variables)
    if classifier is not None:
        weights["fc.weight"] = np.ascontiguousarray(classifier["kernel"].T)
        weights["fc.bias"] = classifier["bias"]
    return network, weights


def about_file(encoder: Encoder, network: ResNet) -> dict[str, str]:
    """Returns what a file of weights says of itself, from which `weights.torchvision.convert` makes the options of the
    model and of its images.
    """
    view = json.dumps(encoder.view.by_option())
    about = {"step": str(encoder.step), "view": view, **architecture(network)}
    if isinstance(encoder, Classifier) and encoder.classes:
        about["classes"] = json.dumps(encoder.classes)
    return about


def write_safetensors(
    path: epath.Path, weights: dict[str, np.ndarray], about: dict[str, str]
) -> None:
    """Writes a .safetensors file, whole or not at all. Raises an OSError if it cannot."""
    from safetensors.numpy import save  # imported here: nothing else needs it

    with replacing(path) as scratch:
        scratch.write_bytes(save(weights, {"format": "pt"} | about))


def write_repository(encoder: Encoder, folder: epath.Path) -> str:
    """Writes FOLDER/model.safetensors, config.json and README.md. Returns the program that loads them.

    Raises:
      UserError: timm has no ResNet that computes the same, or the folder holds something else, such as a run.
    """
    if isinstance(encoder, Classifier) and encoder.network.layer:
        raise UserError(
            f"the classifier reads layer {encoder.network.layer} of the projection head, which timm's ResNets do not "
            "have: use another --format"
        )
    network, weights = torch_weights(encoder)
    _check_exact(network)
    _check_what_is_replaced(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", weights, about_file(encoder, network))
    settings = _timm_settings(encoder, network)
    write_json(folder / "config.json", settings)
    loading = "\n".join(
        [
            "import timm",
            "",
            f'model = timm.create_model("{settings["architecture"]}", num_classes={settings["num_classes"]},',
            f"    checkpoint_path={quoted(folder / 'model.safetensors')}).eval()",
            f"# images: float32 [N, 3, H, W] {_pixels(settings)}",
            f"{'logits' if settings['num_classes'] else 'h'} = model(images)",
        ]
    )
    if (folder / "README.md").exists():  # its owner may have added to it
        say(f"kept        {folder / 'README.md'}; remove it to have it written anew")
    else:
        write_text(folder / "README.md", _card(encoder, network, settings, loading))
    return loading


def _check_what_is_replaced(folder: epath.Path) -> None:
    """Raises a UserError if a file of the repository would replace one of something else, such as a run's."""
    config = folder / "config.json"
    if config.exists() and '"architecture"' in config.read_text():
        return
    for name in ("config.json", "model.safetensors", "README.md"):
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} is not of a repository, and would be replaced: use another --output"
            )


def _check_exact(network: ResNet) -> None:
    wanted = {"stem": "imagenet", "pool_padding": "symmetric", "channel_factor": 1}
    differ = [name for name, value in wanted.items() if getattr(network, name) != value]
    if network.depth not in DEPTHS:
        differ.append("depth")
    if network.project_shortcuts and network.depth < 50:
        differ.append("project_shortcuts")
    if differ:
        names = ", ".join(f"model.{'width' if n == 'channel_factor' else n}" for n in differ)
        raise UserError(
            f"timm has no ResNet with this {names}: expected depth {', '.join(map(str, DEPTHS))}, "
            "model.width=1, model.stem=imagenet, model.pool_padding=symmetric and no projected shortcuts of the "
            "first stage; --format=safetensors writes a program that builds any of them from torchvision's parts"
        )


def _timm_settings(encoder: Encoder, network: ResNet) -> dict:
    """Returns config.json as timm reads it: the network, and what is done to images."""
    mean, deviation = STANDARDS[network.standardize] or ((0.0,) * 3, (1.0,) * 3)
    size = encoder.image_size
    classes = encoder.classes if isinstance(encoder, Classifier) else None
    outputs = encoder.width if isinstance(encoder, Classifier) else 0
    settings = {
        "architecture": f"resnet{network.depth}",
        "num_classes": outputs,
        "num_features": network.width,
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": "simclr_jax",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": encoder.view.proportion,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(deviation),
            "num_classes": outputs,
            "pool_size": [-(-size // 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    return settings | ({"label_names": classes} if classes else {})


def _pixels(settings: dict) -> str:
    """Says what is done to pixels before the network sees them."""
    mean, deviation = (settings["pretrained_cfg"][name] for name in ("mean", "std"))
    if not any(mean):
        return "in [0, 1], not standardised"
    return f"in [0, 1], less {mean}, divided by {deviation}"


def _card(encoder: Encoder, network: ResNet, settings: dict, loading: str) -> str:
    """Writes the model card: a header in YAML, and what a user has to know."""
    what = "classifier" if settings["num_classes"] else "encoder"
    task = "image-classification" if settings["num_classes"] else "image-feature-extraction"
    tags = "- timm"
    origin = f"Imported, not trained, by simclr_jax, for images of {encoder.image_size} px."
    if encoder.step:
        tags, what = "- simclr\n- timm", f"SimCLR {what}"
        origin = (
            f"Trained for {encoder.step} steps at {encoder.image_size} px by simclr_jax, an implementation of SimCLR\n"
            "(https://arxiv.org/abs/2002.05709)."
        )
    return f"""---
library_name: timm
pipeline_tag: {task}
tags:
{tags}
---
# {network.describe()}, {what}
{origin}

It takes images {_pixels(settings)}, {encoder.image_size} x {encoder.image_size} px: the largest centred square, of whose side
{encoder.view.proportion:g} is kept, resized by bicubic interpolation. It gives
{settings["num_classes"] or network.width} numbers an image{" (logits)" if settings["num_classes"] else " (the representation h)"}.

```python
{loading}
```
What it was trained on, what it reaches and its licence are not known to the program that wrote this page: add them.
"""
