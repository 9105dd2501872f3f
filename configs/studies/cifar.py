"""Figure B.7: CIFAR-10, batch size and length; the validation part chooses tau and the learning rate.

As published, with `--config=configs/cifar10.py`: 50 kinds of runs with 9 settings each; the paper tries rates of
0.5, 1.0 and 1.5 at tau 0.1, 0.5 and 1.0. A number of the paper is the mean over its three rates at tau 0.5; ours is
that of the best of all nine, by the validation part, so it is a little higher for the same training. EPOCHS and BATCHES below are for a pod; shorten them for less.
"""

from simclr_jax.studies import Factor, Level, Published, Study, rises

BATCHES = ("256", "512", "1024", "2048", "4096")
EPOCHS = tuple(str(n) for n in range(100, 1001, 100))
_FIGURE_B7 = {
    "256": (83.9, 89.3, 91.5, 92.2, 93.0, 93.1, 93.5, 93.5, 93.5, 93.6),
    "512": (84.7, 90.2, 91.9, 92.8, 93.1, 93.3, 93.6, 93.6, 93.7, 93.7),
    "1024": (85.2, 90.5, 92.0, 93.0, 93.4, 93.6, 93.7, 93.8, 93.7, 93.8),
    "2048": (84.8, 90.4, 92.3, 93.0, 93.3, 93.6, 93.8, 93.9, 93.8, 93.8),
    "4096": (83.2, 89.8, 91.9, 92.7, 93.1, 93.2, 93.4, 93.6, 93.7, 93.5),
}
SETTINGS = tuple(
    {"loss.temperature": tau, "optimizer.learning_rate": rate}
    for tau in (0.1, 0.5, 1.0)
    for rate in (0.5, 1.0, 1.5)
)


def get_study() -> Study:
    """450 runs per seed."""
    epochs = {e: Level({"train.epochs": float(e)}, SETTINGS) for e in EPOCHS}
    batches = {f"batch {b}": Level({"data.batch_size": int(b)}) for b in BATCHES}
    published: dict[tuple[str, ...], float] = {
        (e, f"batch {b}"): value
        for b, values in _FIGURE_B7.items()
        for e, value in zip(EPOCHS, values, strict=True)
    }
    return Study(
        title="CIFAR-10, batch size and epochs (figure B.7)",
        factors=(Factor("epochs", epochs, numbers=True), Factor("batch", batches)),
        claims=tuple(
            rises(f"longer training helps at {batch}", [(e, batch) for e in EPOCHS])
            for batch in batches
        ),
        published=Published(
            "paper, figure B.7: CIFAR-10, linear, mean over rates at tau 0.5", published
        ),
        seeds=1,
    )
