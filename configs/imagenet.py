"""SimCLR on ImageNet, as in the paper: section 2.3, and table 6 for the larger encoders.

Linear evaluation, top-1, on the validation split (not reproduced here; each figure with its source):
    imagenet.py                                100 epochs   64.5 %   the published code's README
    imagenet.py:epochs=1000                   1000 epochs   69.3 %   paper, table 6
    imagenet.py:epochs=1000,width=2           1000 epochs   74.2 %   paper, table 6
    imagenet.py:epochs=1000,width=4           1000 epochs   76.5 %   paper, table 6
Hardware: ResNet-50 takes some 6 hours for 100 epochs on 32 TPU v3 cores (README of the published code), 1.5 hours on 128
(paper, appendix B.3).
Compiled for those 32 (--mode=compile --topology=v3:4x4) it takes 9.0 of 15.5 GiB a core.
The products of encoder and head are in bfloat16. Everything else is the defaults of simclr_jax/config/: batch 4096,
LARS, learning rate 4.8, tau 0.1, views of appendix A.

TFDS cannot download ImageNet: put its archives where the TFDS catalogue says (imagenet2012).

    python -m simclr_jax.main --config=configs/imagenet.py --workdir=/tmp/simclr_imagenet \
        --config.data.path=TFDS_FOLDER

The table's figures are from linear evaluation of a finished training, with all training images:

    python -m simclr_jax.main --mode=linear --workdir=/tmp/simclr_imagenet \
        --config.eval.validation_fraction=0 --config.eval.baselines=False
"""

from simclr_jax import config


def get_config(argument: str = ""):
    """`argument`: any of depth=LAYERS, width=MULTIPLIER, epochs=NUMBER, separated by commas."""
    given = config.parse_argument(argument, depth=int, width=float, epochs=float)
    c = config.default()
    c.data.name = "imagenet2012"
    c.data.test_split = "validation"  # the labels of "test" are not public
    c.model.dtype = "bfloat16"
    c.model.depth = given.get("depth", 50)
    c.model.width = given.get("width", 1.0)
    c.train.epochs = given.get("epochs", 100.0)
    c.eval.labels_per_class = ()  # the 1 % split alone: 13 labels per class
    return c
