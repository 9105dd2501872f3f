"""Figure 9: batch size and length of training. The learning rate follows the configuration's scaling.

--study=batch_epochs          batches of 64 to 256 and 4 to 16 epochs, for CPUs
--study=batch_epochs:paper    the paper's, for `configs/imagenet.py` on a pod: 60 runs of up to 1,000 epochs
"""

from simclr_jax.studies import Factor, Level, Published, Study, above, of_scale, rises

_FIGURE_9 = {
    "256": (57.5, 61.9, 63.6, 64.7, 65.3, 65.5, 66.0, 66.6, 66.7, 67.0),
    "512": (60.7, 64.0, 65.4, 66.2, 66.7, 67.0, 67.4, 67.8, 68.1, 68.0),
    "1024": (62.8, 65.3, 66.4, 67.2, 67.9, 68.1, 68.4, 68.5, 68.8, 68.8),
    "2048": (64.0, 66.1, 67.2, 68.1, 68.1, 68.8, 68.6, 68.9, 68.9, 69.3),
    "4096": (64.6, 66.5, 67.4, 68.1, 68.3, 68.5, 68.8, 68.9, 69.0, 69.3),
    "8192": (64.8, 66.6, 67.4, 67.8, 68.3, 68.7, 68.7, 69.0, 69.0, 68.9),
}
_PAPER = tuple(_FIGURE_9), tuple(str(n) for n in range(100, 1001, 100))
_SMALL = ("64", "128", "256"), ("4", "8", "16")


def get_study(argument: str = "") -> Study:
    """`argument`: "" or "paper". 9 runs per seed, or 60 and one seed."""
    batches, epochs = of_scale(argument, small=_SMALL, paper=_PAPER)
    sizes = {b: Level({"data.batch_size": int(b)}) for b in batches}
    lengths = {f"{e} epochs": Level({"train.epochs": float(e)}) for e in epochs}
    published: dict[tuple[str, ...], float] = {
        (batch, f"{length} epochs"): value
        for batch, values in _FIGURE_9.items()
        for length, value in zip(_PAPER[1], values, strict=True)
    }
    return Study(
        title="Batch size and epochs (figure 9)",
        factors=(Factor("batch, images", sizes, numbers=True), Factor("length", lengths)),
        claims=(
            rises("longer training helps", [(batches[0], length) for length in lengths]),
            above(
                "in a short training a larger batch is better",
                (batches[-1], f"{epochs[0]} epochs"),
                (batches[0], f"{epochs[0]} epochs"),
            ),
        ),
        published=Published("paper, figure 9: ImageNet, linear, top-1", published)
        if argument
        else None,
        seeds=1 if argument else 3,
    )
