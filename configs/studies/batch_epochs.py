"""Figure 9: batch size and length of training. The learning rate follows the configuration's scaling.

The paper's batches are 256 to 8,192 and its lengths 100 to 1,000 epochs: no common point with these.
"""

from simclr_jax.studies import Factor, Level, Study, above, rises

BATCHES, EPOCHS = ("64", "128", "256"), ("4", "8", "16")


def get_study() -> Study:
    """9 runs a seed, of 4 to 16 epochs."""
    batches = {b: Level({"data.batch_size": int(b)}) for b in BATCHES}
    epochs = {f"{e} epochs": Level({"train.epochs": float(e)}) for e in EPOCHS}
    return Study(
        title="Batch size and epochs (figure 9)",
        factors=(Factor("batch, images", batches, numbers=True), Factor("length", epochs)),
        claims=(
            rises("longer training helps", [("64", f"{e} epochs") for e in EPOCHS]),
            above(
                "in a short training a larger batch is better",
                ("256", f"{EPOCHS[0]} epochs"),
                ("64", f"{EPOCHS[0]} epochs"),
            ),
        ),
    )
