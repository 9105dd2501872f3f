"""SimCLR on a folder of your own images, without labels: every image below it, at any depth.

Nobody can say what it reaches on your images. Resolution, stem, batch, epochs and the like are chosen
from how many images there are, how large they are, and whether there is a GPU or TPU or only a CPU; the
run says which and why before it starts, and any option given on the command line counts instead.

    python -m simclr_jax.main --config=configs/folder.py:PATH --workdir=/tmp/simclr_folder

If the folders below PATH are classes, --config.data.folder_labels=True trains a classifier alongside
to watch, and with --config.data.test_path=OTHER_PATH the run ends with a probe on the images below
OTHER_PATH.
"""

import jax

from simclr_jax import config
from simclr_jax.data import suggest
from simclr_jax.data.index import look
from simclr_jax.files import expanded


def get_config(argument: str = ""):
    """`argument`: the folder."""
    if not argument:
        raise ValueError("which folder? expected --config=configs/folder.py:PATH")
    c = config.default()
    c.data.source = "folder"
    c.data.path = argument
    found = look(expanded(argument))
    accelerator = jax.default_backend() != "cpu"
    count = max(1, found.images)
    config.set_options(c, suggest.suggest_options(count, found.short_side, accelerator))
    c.train.report = True
    return c
