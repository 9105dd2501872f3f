"""Table B.1: the learning rate grows with the batch, or with its square root, by LARS.

The paper's batches are 256 to 8,192: no common point with these. Its finding: the square root is better with small
batches and short trainings, and the two agree as training gets longer. The base rates are its own, so that
both are the same at batch 4,096.
"""

from simclr_jax.studies import Factor, Level, Study, above, rises

BATCHES, EPOCHS = ("64", "128", "256"), ("4", "16")


def get_study() -> Study:
    """12 runs a seed."""
    batches = {b: Level({"data.batch_size": int(b), "optimizer.name": "lars"}) for b in BATCHES}
    rates = {"linear": 0.3, "sqrt": 0.075}
    how = {
        f"{scaling}, {epochs} epochs": Level(
            {
                "optimizer.scaling": scaling,
                "optimizer.learning_rate": rate,
                "optimizer.weight_decay": 1e-6,
                "train.epochs": float(epochs),
            }
        )
        for scaling, rate in rates.items()
        for epochs in EPOCHS
    }
    return Study(
        title="Scaling of the learning rate (Table B.1)",
        factors=(Factor("batch, images", batches, numbers=True), Factor("learning rate", how)),
        claims=(
            above(
                "with the smallest batch and the short training the square root is better",
                (BATCHES[0], f"sqrt, {EPOCHS[0]} epochs"),
                (BATCHES[0], f"linear, {EPOCHS[0]} epochs"),
            ),
            rises(
                "by the linear rule the short training gains from a larger batch",
                [(b, f"linear, {EPOCHS[0]} epochs") for b in BATCHES],
            ),
        ),
    )
