"""SimCLR on tinted Fashion-MNIST: garments in colours that tell pictures apart and not classes, for studies.

3,000 pictures to train on and 2,000 to test on, of 28 px, made by `python benchmarks/tinted.py tinted.npz`. The
options are those that configs/folder.py chooses for as many images on a CPU, but for the length.

    python -m simclr_jax.main --config=configs/tinted.py:tinted.npz --workdir=/tmp/simclr_tinted
"""

from simclr_jax import config
from simclr_jax.data import suggest

IMAGES, SHORT_SIDE = 3000, 28


def get_config(argument: str = ""):
    """`argument`: the file; "": tinted.npz."""
    c = config.default()
    c.data.source, c.data.path = "arrays", argument or "tinted.npz"
    chosen = suggest.suggest_settings(IMAGES, SHORT_SIDE, accelerator=False)
    chosen += suggest.suggest_evaluation(IMAGES, accelerator=False)
    config.set_options(c, {option: value for option, value, _ in chosen})
    c.train.epochs = 8.0
    c.eval.labels_per_class = (10,)
    c.eval.label_fraction = 0.0
    return c
