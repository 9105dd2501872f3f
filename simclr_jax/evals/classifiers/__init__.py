"""Evaluations that train a classifier on random crops. To add one, write its `Protocol` and a row in
`TRAININGS`.

Every training runs through `training.loop.fit` in a folder of its own below WORKDIR/MODE (for other data than those of
pretraining: WORKDIR/MODE_NAME_DIGEST), so a command given again goes on where it was stopped, and nothing that was
finished is trained again.
"""

from simclr_jax.evals.classifiers.finetune import finetune, transfer_finetune
from simclr_jax.evals.classifiers.linear import linear
from simclr_jax.evals.contract import ClassifierEvaluation

# --mode: the evaluation it runs.
TRAININGS = {
    "linear": ClassifierEvaluation("linear evaluation by SGD on random crops", linear),
    "finetune": ClassifierEvaluation(
        "train the whole network with all labels and with few", finetune
    ),
    "transfer_finetune": ClassifierEvaluation(
        "train the whole network with a grid of settings, as for transfer to other data",
        transfer_finetune,
    ),
}
