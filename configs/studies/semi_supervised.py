"""Table 7 and B.4: fine-tuned with 1 % and 10 % of the labels, beside the same network without pretraining.

The paper's top-1 accuracies (Table B.4) are of ResNet-50, no common point with a small encoder: supervised 25.4 and
56.4 %; SimCLR 48.3 and 65.6 %, two times as wide 58.5 and 71.7 %, four times 63.0 and 74.4 %. The length of the
fine-tuning is the configuration's, finetune.label_fractions and finetune.epochs.
"""

from simclr_jax.studies import Factor, Level, Study, above, rises

WIDTHS, SHARES = ("0.125", "0.25", "0.5"), ("1 %", "10 %")


def get_study() -> Study:
    """6 runs a seed."""
    widths = {width: Level({"model.width": float(width)}) for width in WIDTHS}
    pretraining = {
        "SimCLR": Level({}),
        "none": Level({"train.steps": 1, "optimizer.warmup_epochs": 0.0}),
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
                    (WIDTHS[-1], "SimCLR", share),
                    (WIDTHS[-1], "none", share),
                )
                for share in SHARES
            ),
            *(
                rises(
                    f"with {share} of the labels a wider pretrained encoder is better",
                    [(width, "SimCLR", share) for width in WIDTHS],
                )
                for share in SHARES
            ),
        ),
    )
