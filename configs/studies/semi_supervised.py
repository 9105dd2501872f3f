"""Table 7 and B.4: fine-tuned with 1 % and 10 % of the labels, beside the same network without pretraining.

The length of the fine-tuning is the configuration's, finetune.label_fractions and finetune.epochs. "none" is trained by
the same settings, from random weights; the paper's supervised numbers come from settings tuned for few labels. The
labels are drawn anew in each of eval.seeds draws; the paper's are the fixed lists of TFDS's imagenet2012_subset.

    --study=semi_supervised          an eighth to a half of the width, for CPUs
    --study=semi_supervised:paper    the width, twice and four times it, for `configs/imagenet.py:epochs=1000` on a
                                     pod: 6 runs
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, of_scale, rises

SHARES = ("1 %", "10 %")
_SMALL, _PAPER = ("0.125", "0.25", "0.5"), ("1", "2", "4")
# Top-1, Table B.4; the supervised numbers are of ResNet-50 at width 1.
_TABLE_B4 = {
    "SimCLR": ((48.3, 65.6), (58.5, 71.7), (63.0, 74.4)),
    "none": ((25.4, 56.4),),
}


def get_study(argument: str = "") -> Study:
    """`argument`: "" or "paper". 6 runs per seed, or 6 and one seed."""
    names = of_scale(argument, small=_SMALL, paper=_PAPER)
    widths = {width: Level({"model.width": float(width)}) for width in names}
    pretraining = {
        "SimCLR": Level({}),
        "none": Level(
            {"train.steps": 1, "optimizer.warmup_epochs": 0.0, "optimizer.learning_rate": 0.0}
        ),
    }
    published: dict[tuple[str, ...], float] = {
        (width, kind, share): value
        for kind, rows in _TABLE_B4.items()
        for width, values in zip(_PAPER, rows, strict=False)
        for share, value in zip(SHARES, values, strict=True)
    }
    return Study(
        title="Few labels (Table 7)",
        factors=(
            Factor("width", widths, numbers=True),
            Factor("pretraining", pretraining),
        ),
        evaluation="finetune",
        readings={share: {} for share in SHARES},
        claims=(
            *(
                above(
                    f"pretraining helps with {share} of the labels",
                    (names[-1], "SimCLR", share),
                    (names[-1], "none", share),
                )
                for share in SHARES
            ),
            *(
                rises(
                    f"with {share} of the labels a wider pretrained encoder is better",
                    [(width, "SimCLR", share) for width in names],
                )
                for share in SHARES
            ),
        ),
        published=Published("paper, Table B.4: ImageNet, top-1", published) if argument else None,
        seeds=1 if argument else 3,
    )
