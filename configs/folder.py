"""SimCLR on your own images, without labels: all images below a folder, in Parquet files, or in an .npz file.

Nobody can say what it reaches on your images. Resolution, stem, batch, epochs and the like are chosen
from how many images there are, how large they are, and whether there is a GPU or TPU or only a CPU; the
run says which and why before it starts, and any option given on the command line counts instead.

    python -m simclr_jax.main --config=configs/folder.py:PATH --workdir=/tmp/simclr_folder

PATH is a folder, whose images count at any depth; Parquet files, such as 'DATA/*.parquet'; or FILE.npz with an
array train_images, uint8 [N, H, W, 1 or 3].

If the folders below PATH are classes, --config.data.folder_labels=True trains a classifier alongside
to watch, and with --config.data.test_path=OTHER_PATH the run ends with a probe on the images below
OTHER_PATH. Labels of Parquet and .npz files are used where there are any.
"""

import jax

from simclr_jax import config
from simclr_jax.config import suggest
from simclr_jax.data import kind_of, measure
from simclr_jax.data.parquet_files import chosen_column, image_columns


def get_config(argument: str = ""):
    """`argument`: the folder or files."""
    if not argument:
        raise ValueError("which images? expected --config=folder:PATH")
    c = config.default()
    c.data.source = kind_of(argument)
    c.data.path = argument
    looked_at = c.data.to_dict() | {"seed": c.seed}
    if c.data.source == "parquet":  # opened here, before options of the command line apply
        found = image_columns(argument)
        column = c.data.parquet.image_column = chosen_column(found, c.data.parquet.image_column)
        if column not in found:
            column = (found or [column])[0]
        looked_at["parquet"] = {"image_column": column, "label_column": ""}
    count, short_side, sample_bits = measure(looked_at)
    accelerator = jax.default_backend() != "cpu"
    about = max(1, count), short_side, accelerator, sample_bits
    config.set_options(c, suggest.suggest_options(*about))
    c.train.report = True
    return c
