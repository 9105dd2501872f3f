"""--mode=linear: a linear classifier on a frozen encoder, trained on random crops (appendix B.6)."""

from ml_collections import ConfigDict

from simclr_jax.evals.classifiers.protocol import Length, Protocol, Search, candidates
from simclr_jax.evals.classifiers.result import train_all


def linear(config: ConfigDict, workdir: str) -> dict:
    """Evaluates linearly as in appendix B.6: f frozen, SGD on random crops, all labels.

    Writes WORKDIR/linear.json and shows a table.

    Returns:
      the result.

    Raises:
      Stopped: a signal has stopped it.
    """
    options = config.linear
    title = "Linear evaluation by SGD (appendix B.6), test accuracy"
    searches = [Search(1.0, Length(options.epochs, "epochs"), candidates(options))]
    protocol = Protocol(
        "linear", title, options, train_encoder=False, layer=0, searches=lambda _: searches
    )
    return train_all(config, workdir, protocol)
