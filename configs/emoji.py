"""SimCLR on emoji: colour pictures of two vendors in nine categories, a short run for studies.

2,950 pictures to train on and 862 to test on, of 64 px, seen at 32 px; prepared by
`python benchmarks/emoji.py emoji` (two public packages, 20 MB). The options are those that configs/folder.py
chooses for as many images on a CPU, except two: 8 epochs, which are under a minute of training on 2 CPU cores
and show trends, and a warm-up of a tenth of them. Seed 0, 2026-11-29; test accuracy, mean and sample
deviation over 5 draws of the labels:
    labels per class          10            all      knn, k 29
    raw pixels         43.1 +- 2.3 %    59.3 %    51.9 %
    untrained encoder  33.3 +- 2.1 %    50.7 %    54.5 %
    encoder            44.9 +- 3.6 %    61.5 %    59.4 %

    python -m simclr_jax.main --config=configs/emoji.py:emoji --workdir=/tmp/simclr_emoji
"""

import pathlib

from simclr_jax import config
from simclr_jax.config import suggest

IMAGES, SHORT_SIDE = 2950, 64


def get_config(argument: str = ""):
    """`argument`: the folder that holds train/ and test/; "": emoji."""
    c = config.default()
    folder = pathlib.Path(argument or "emoji")
    c.data.source = "folder"
    c.data.path, c.data.test_path = str(folder / "train"), str(folder / "test")
    c.data.folder_labels = True
    config.set_options(c, suggest.suggest_options(IMAGES, SHORT_SIDE, accelerator=False))
    c.train.epochs, c.optimizer.warmup_epochs = 8.0, 0.8
    c.eval.labels_per_class = (10,)
    c.eval.label_fraction = 0.0
    c.train.report = True
    return c
