"""Writes the projection head, or a classifier with the layers below it, for PyTorch's `Sequential`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from simclr_jax.files import quoted

# Per dense layer of g: Linear, BatchNorm1d, ReLU; the last of g has no ReLU.
_PARTS = 3


def head_weights(
    head: Mapping[str, Any], layers: int, classifier: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Returns {name in a `Sequential`: float32 array}.

    Args:
      head: {"params", "batch_stats"} of a `ProjectionHead`.
      layers: how many of its layers are written.
      classifier: {"kernel", "bias"} of a linear layer on the last of them; None: there is none.
    """
    head = jax.device_get(head)
    found: dict[str, Any] = {}
    for layer in range(layers):
        dense, norm = f"dense{layer + 1}", f"norm{layer + 1}"
        params, statistics = head["params"][norm], head["batch_stats"][norm]
        place = _PARTS * layer
        found[f"{place}.weight"] = head["params"][dense]["kernel"].T
        found[f"{place + 1}.weight"] = params["scale"]
        # The last BatchNorm of g has no bias.
        found[f"{place + 1}.bias"] = params.get("bias", np.zeros_like(params["scale"]))
        found[f"{place + 1}.running_mean"] = statistics["mean"]
        found[f"{place + 1}.running_var"] = statistics["var"]
    if classifier is not None:
        found[f"{_PARTS * layers}.weight"] = np.asarray(classifier["kernel"]).T
        found[f"{_PARTS * layers}.bias"] = classifier["bias"]
    return {name: np.ascontiguousarray(x, np.float32) for name, x in found.items()}


def head_loading(weights: Mapping[str, np.ndarray], path: Any, is_whole: bool) -> str:
    """Writes the PyTorch program that loads `head_weights` and applies them to h [N, D].

    Args:
      weights: those in the file.
      path: the file.
      is_whole: whether the last layer of g is among them, which has no ReLU.
    """
    kernels = sorted(
        (int(name.split(".")[0]), x.shape) for name, x in weights.items() if x.ndim == 2
    )
    normed = [place for place, _ in kernels if f"{place + 1}.running_mean" in weights]
    modules = []
    for place, (out, width) in kernels:
        if place not in normed:
            modules.append(f"torch.nn.Linear({width}, {out})")
            continue
        relu = "Identity" if is_whole and place == normed[-1] else "ReLU"
        modules.append(
            f"torch.nn.Linear({width}, {out}, bias=False), torch.nn.BatchNorm1d({out}), torch.nn.{relu}()"
        )
    return "\n".join(
        [
            "head = torch.nn.Sequential(",
            *(f"    {module}," for module in modules),
            ")",
            f"head.load_state_dict(load_file({quoted(path)}))",
            f"{'z' if len(normed) == len(kernels) else 'logits'} = head.eval()(h)",
        ]
    )
