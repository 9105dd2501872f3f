"""What is evaluated: the newest encoder of a workdir, and an untrained one to compare it with."""

import contextlib
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.checkpoint import find, read_head, read_newest, with_shardings
from simclr_jax.data.broken import Broken
from simclr_jax.data.sources import Source, Split
from simclr_jax.encoder import read_variables
from simclr_jax.errors import UserError
from simclr_jax.mesh import replicated
from simclr_jax.record import check_encoder
from simclr_jax.train_state import init_encoder, init_head

KINDS = RAW_PIXELS, UNTRAINED, ENCODER = "raw pixels", "untrained encoder", "encoder"


class Trained(NamedTuple):
    """{"params", "batch_stats"} of f and, if asked for, g; and what was saved beside them."""

    encoder: dict
    head: dict | None
    saved: dict


def trained(
    config: ConfigDict, workdir: str, mesh: Mesh, head: bool = False, step: int | None = None
) -> Trained:
    """The newest encoder, or that of a step, on every device, and its projection head if asked for.

    Raises:
      UserError: there is none, or it is of another model than the configuration says.
    """

    def read(checkpoint: epath.Path) -> Trained:
        saved = check_encoder(config, checkpoint)
        network, everywhere = assemble.encoder(config), replicated(mesh)
        encoder = read_variables(config, network, checkpoint, everywhere)
        if not head:
            return Trained(encoder, None, saved)
        abstract = jax.eval_shape(
            lambda: init_head(assemble.head(config), network.width_of_h, jax.random.key(0))
        )
        return Trained(encoder, read_head(checkpoint, with_shardings(abstract, everywhere)), saved)

    return read_newest(workdir, read) if step is None else read(find(workdir, step))


def is_labelled(source: Source) -> bool:
    """Whether both splits are there and have labels."""
    return bool(source.train.classes and source.test is not None and source.test.classes)


def labelled(config: ConfigDict) -> Source:
    """The data of the configuration. Raises a UserError unless both splits have labels."""
    source = assemble.source(config)
    if not is_labelled(source):
        lacking = "labelled test split" if source.train.classes else "labels"
        raise UserError(
            f"the data have no {lacking}, so there is nothing to evaluate on; see "
            "data.folder_labels, data.test_path and data.test_split"
        )
    return source


def batch_size_of(config: ConfigDict, mesh: Mesh) -> int:
    """Images of the global batch that is embedded at once: it must divide over the devices."""
    return -(-config.eval.batch_size // mesh.size) * mesh.size


def untrained(
    config: ConfigDict, split: Split, broken: Broken, batch_size: int, mesh: Mesh
) -> dict:
    """The encoder before training, made as good as an untrained one can be.

    As initialised it would be a straw man: with the last BatchNorm scale of each block at zero it
    sees through its strided 1x1 shortcuts only (at 16 px: one corner of the image). So here these
    scales are one, and the running statistics are those of one batch of views.
    """
    size = config.data.image_size
    network = assemble.encoder(config, parts=mesh.size).clone(
        zero_init_residual=False, norm_momentum=0.0
    )
    batches = assemble.training_batches(config, split, 0, broken, batch_size)
    with contextlib.closing(batches):
        batch = assemble.feed(config, split, mesh)(next(batches))
    fetch, make_views = assemble.view_functions(config)

    def calibrated(key, batch):
        variables = init_encoder(network, size, key)
        first = make_views(fetch(batch))[:, 0]
        _, seen = network.apply(variables, first, train=True, mutable=["batch_stats"])
        return {"params": variables["params"], "batch_stats": seen["batch_stats"]}

    return jax.jit(calibrated, out_shardings=replicated(mesh))(jax.random.key(config.seed), batch)
