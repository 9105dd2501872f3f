"""SimCLR on a folder of your own images, without labels: every image below it, at any depth.

Nobody can say what it reaches on your images. The settings are the paper's for ImageNet, but for
a batch that fits one GPU of 16 GB or more, with the learning rate that the paper found better for
small batches (appendix B.1: 0.075 x sqrt(B)).

    python -m simclr_jax.main --config=configs/folder.py:PATH --workdir=/tmp/simclr_folder

Fewer than some 10,000 images need more epochs (--config.train.epochs=500). If the folders below
PATH are classes, --config.data.folder_labels=True trains a classifier alongside to watch, and with
--config.data.test_path=OTHER_PATH the run ends with a probe on the images below OTHER_PATH.
"""

from simclr_jax import config


def get_config(argument: str = ""):
    """`argument`: the folder."""
    if not argument:
        raise ValueError("which folder? expected --config=configs/folder.py:PATH")
    c = config.default()
    c.data.source = "folder"
    c.data.path = argument
    c.data.batch_size = 256
    c.model.dtype = "bfloat16"
    c.optimizer.scaling = "sqrt"
    c.optimizer.learning_rate = 0.075
    return c
