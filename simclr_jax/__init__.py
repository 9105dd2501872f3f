"""SimCLR pretraining in JAX: from a laptop CPU to a TPU pod with one code path.

From Python: `pretrain(config, workdir)` trains as --mode=pretrain does, without the probe and the report at its
end; `evaluate("probe", workdir)` makes the probe, and `load_encoder(workdir)` the encoder. `make_views(config, image)`
makes views. Importing this package does not import TensorFlow.
"""

import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simclr_jax.pretrained import Classifier, Encoder, load_classifier, load_encoder

__all__ = [
    "Classifier",
    "Encoder",
    "evaluate",
    "load_classifier",
    "load_encoder",
    "make_views",
    "pretrain",
]


def pretrain(
    config: ConfigDict | str | os.PathLike, workdir: str, *, extend: bool = False, **options: Any
) -> bool:
    """Pretrains an encoder, from the workdir's newest checkpoint or from the start.

    Args:
      config: a configuration, such as `simclr_jax.config.default()` with changes, or the name or file of one, with
        its argument if it takes one: "digits", "folder:PHOTOS", "FILE.py:ARGUMENT".
      workdir: folder of everything that is written.
      extend: allow a length that differs from the one that the run was begun with.
      options: values of options, by name: pretrain(..., **{"train.steps": 100}).

    Returns:
      True if training finished; False if a signal stopped it: call again with the same arguments to
      go on.

    Raises:
      UserError: the user can mend the cause; the message says how.
    """
    from simclr_jax.errors import Stopped
    from simclr_jax.modes.pretrain import pretrain

    workdir = _begun(workdir)
    try:
        pretrain(_with_options(config, options), workdir, extend)
    except Stopped:
        return False
    return True


def evaluate(
    name: str, workdir: str, config: ConfigDict | str | os.PathLike | None = None, **options: Any
) -> dict | None:
    """Evaluates the newest checkpoint of a workdir, beside its baselines; shows a table.

    Args:
      name: "probe", "knn", "transfer", "linear", "finetune" or "transfer_finetune".
      workdir: the run's folder, or a checkpoint folder.
      config: settings of the evaluation, which may name a different data set; None: the run's own.
      options: values of options, by name: evaluate(..., **{"eval.knn_k": 20}).

    Returns:
      {"step", "rows": see `evals.results.row`, "train_images", "test_images", "settings"}, as in
      WORKDIR/NAME.json; None if a signal stopped it.

    Raises:
      UserError: the user can mend the cause; the message says how.
    """
    from simclr_jax.config import from_dict
    from simclr_jax.errors import Stopped
    from simclr_jax.evals.evaluate import evaluate
    from simclr_jax.training.record import saved_config

    workdir = _begun(workdir)
    unknown: tuple[str, ...] = ()
    if config is None:
        config = from_dict(saved_config(workdir))
        # A run may have a loss that its own configuration file adds, and an evaluation needs no loss.
        unknown = () if "loss.name" in options else ("loss.name",)
    try:
        return evaluate(name, _with_options(config, options, unknown), workdir)
    except Stopped:
        return None


def make_views(
    config: ConfigDict | str | os.PathLike,
    image: Any,
    *,
    epoch: int = 0,
    index: int = 0,
    **options: Any,
) -> np.ndarray:
    """Makes the two views of an image that training sees in one epoch (paper, section 2.1 and appendix A).

    Args:
      config: see `pretrain`.
      image: the path of an image file, a PIL image, or uint8 [H, W, 3], or [H, W] for grey.
      epoch, index: number of the epoch and the image's place in the training split; with the option seed they decide the
        random numbers.
      options: values of options, by name: make_views(..., **{"views.color_strength": 0.5}).

    Returns:
      uint8 [2, S, S, 3], S the option data.image_size.

    Raises:
      UserError: the user can mend the cause; the message says how.
      OSError, ValueError: the image cannot be read, or is something else.
    """
    import jax

    from simclr_jax import assemble
    from simclr_jax.data import pixels, read_options
    from simclr_jax.mesh import make_mesh
    from simclr_jax.shell import settle_tensorflow

    settle_tensorflow(os.environ)
    config = _with_options(config, options)
    made = assemble.views(config, make_mesh(jax.local_devices()[:1]))
    x = pixels.of_anything(image, read_options(config.data))
    return made.sample(x, epoch, index)[0]


def _begun(workdir: str) -> str:
    """Returns the path of a workdir with the user's home in place of "~". Forgets the images that an earlier call
    opened, as their files may have changed since. Settles TensorFlow, unless it was imported before.
    """
    from simclr_jax import data
    from simclr_jax.files import check_bucket
    from simclr_jax.shell import settle_tensorflow

    settle_tensorflow(os.environ)
    data.forget_opened()
    check_bucket(workdir)
    return os.path.expanduser(workdir)


def _with_options(
    config: ConfigDict | str | os.PathLike, options: dict[str, Any], unknown: tuple[str, ...] = ()
) -> ConfigDict:
    """Returns the validated configuration with `options` set; a ConfigDict of the caller's is copied, not changed. The
    values of the options named in `unknown` are not looked at.
    """
    from simclr_jax.config import flatten, from_dict, set_options, validate
    from simclr_jax.config.overrides import check_is_known, check_is_read
    from simclr_jax.config.python_files import read_file
    from simclr_jax.errors import UserError

    if isinstance(config, ConfigDict):
        config = from_dict(config.copy_and_resolve_references().to_dict())
    elif isinstance(config, str | os.PathLike):
        config = read_file(os.fspath(config))
    else:
        raise UserError(
            f"a configuration is a {type(config).__name__}: expected a ConfigDict, or the path of a file that makes "
            "one, such as 'folder:FILE.npz' for images in FILE.npz"
        )
    known = flatten(config)
    for name in options:
        check_is_known(name, known)
    set_options(config, options)
    validate(config, unknown)
    check_is_read(config, list(options), known["data.source"])
    return config
