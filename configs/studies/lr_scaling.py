"""Figure B.2 beside figure 9: the learning rate grows with the batch, or with its square root, by LARS.

The paper's finding: the square root is better with small batches and short trainings, and the two agree as
training gets longer. The base rates are its own, so that both are the same at batch 4,096.

    --study=lr_scaling          batches of 64 to 256, 4 and 16 epochs, for CPUs
    --study=lr_scaling:paper    the paper's, for `configs/imagenet.py` on a pod: 36 runs of up to 800 epochs
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, of_scale, rises

_SMALL = ("64", "128", "256"), ("4", "16")
_PAPER = ("256", "512", "1024", "2048", "4096", "8192"), ("100", "200", "800")
_PUBLISHED = {
    "linear, 100 epochs": (57.5, 60.7, 62.8, 64.0, 64.6, 64.8),
    "linear, 200 epochs": (61.9, 64.0, 65.3, 66.1, 66.5, 66.6),
    "linear, 800 epochs": (66.6, 67.8, 68.5, 68.9, 68.9, 69.0),
    "sqrt, 100 epochs": (62.8, 63.8, 64.2, 64.6, 64.5, 64.7),
    "sqrt, 200 epochs": (64.3, 65.6, 66.1, 66.8, 66.8, 67.0),
    "sqrt, 800 epochs": (66.5, 67.4, 68.3, 68.8, 69.1, 69.1),
}
_RATES = {"linear": 0.3, "sqrt": 0.075}


def get_study(argument: str = "") -> Study:
    """`argument`: "" or "paper". 12 runs per seed, or 36 and one seed."""
    batches, epochs = of_scale(argument, small=_SMALL, paper=_PAPER)
    lars = {"optimizer.name": "lars", "optimizer.momentum": 0.9}
    sizes = {b: Level(lars | {"data.batch_size": int(b)}) for b in batches}
    how = {
        f"{scaling}, {length} epochs": Level(
            {
                "optimizer.scaling": scaling,
                "optimizer.learning_rate": rate,
                "optimizer.weight_decay": 1e-6,
                "train.epochs": float(length),
            }
        )
        for scaling, rate in _RATES.items()
        for length in epochs
    }
    published: dict[tuple[str, ...], float] = {
        (batch, name): value
        for name, values in _PUBLISHED.items()
        for batch, value in zip(_PAPER[0], values, strict=True)
    }
    return Study(
        title="Scaling of the learning rate (figure B.2)",
        factors=(Factor("batch, images", sizes, numbers=True), Factor("learning rate", how)),
        claims=(
            above(
                "with the smallest batch and the short training the square root is better",
                (batches[0], f"sqrt, {epochs[0]} epochs"),
                (batches[0], f"linear, {epochs[0]} epochs"),
            ),
            rises(
                "by the linear rule the short training gains from a larger batch",
                [(batch, f"linear, {epochs[0]} epochs") for batch in batches],
            ),
        ),
        published=Published("paper, figures 9 and B.2: ImageNet, linear, top-1", published)
        if argument
        else None,
        seeds=1 if argument else 3,
    )
