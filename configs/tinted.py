"""SimCLR on tinted Fashion-MNIST: garments in colours that tell pictures apart and not classes, for studies.

3,000 pictures to train on and 2,000 to test on, of 28 px, made by `python benchmarks/tinted.py tinted.npz`. The
options are those that configs/folder.py chooses for as many images on a CPU, except three: AdamW, tau 0.5, and 8
epochs, half a minute on 2 CPU cores (seed 0, 2026-11-27; mean and sample deviation over 5 draws of the labels):
    labels per class          10            all
    raw pixels         22.4 +- 0.9 %    23.0 %
    untrained encoder  15.7 +- 1.7 %    30.2 %
    encoder            32.8 +- 1.5 %    60.0 %
What single distortions do: docs/findings.md.

    python -m simclr_jax.main --config=configs/tinted.py:tinted.npz --workdir=/tmp/simclr_tinted
"""

from simclr_jax import config
from simclr_jax.config import suggest

IMAGES, SHORT_SIDE = 3000, 28


def get_config(argument: str = ""):
    """`argument`: the file; "": tinted.npz."""
    c = config.default()
    c.data.source, c.data.path = "arrays", argument or "tinted.npz"
    config.set_options(c, suggest.suggest_options(IMAGES, SHORT_SIDE, accelerator=False))
    # AdamW at tau 0.5, not the automatic Muon at 0.2: docs/findings.md was measured so.
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.momentum = "adamw", 2e-3, 0.9
    c.loss.temperature = 0.5
    c.train.epochs = 8.0
    c.eval.labels_per_class = (10,)
    c.eval.label_fraction = 0.0
    return c
