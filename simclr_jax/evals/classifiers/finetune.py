"""--mode=finetune and transfer_finetune: whole networks trained with labels (appendices B.5 and B.8)."""

from ml_collections import ConfigDict

from simclr_jax.evals.classifiers.protocol import Length, Protocol, Search, candidates
from simclr_jax.evals.classifiers.result import train_all
from simclr_jax.evals.subjects import ENCODER
from simclr_jax.training.optimizer import scaled_learning_rate


def finetune(config: ConfigDict, workdir: str) -> dict:
    """Fine-tunes the whole network with fractions of the labels (appendix B.5), from h or from a layer
    of the projection head. The untrained encoder beside it is trained in the same way from its random
    start.

    Writes WORKDIR/finetune.json, or WORKDIR/finetune_layer_L.json from layer L of the head, and shows a table.

    Returns:
      the result.

    Raises:
      Stopped: a signal has stopped it.
    """
    options = config.finetune
    title = "Fine-tuning (appendix B.5), test accuracy"
    if options.from_layer:
        title = f"Fine-tuning from layer {options.from_layer} of the head, test accuracy"
    searches = [
        Search(fraction, Length(epochs, "epochs"), candidates(options))
        for fraction, epochs in zip(options.label_fractions, options.epochs, strict=True)
    ]
    protocol = Protocol(
        "finetune",
        title,
        options,
        train_encoder=True,
        layer=options.from_layer,
        searches=lambda _: searches,
    )
    return train_all(config, workdir, protocol)


def transfer_finetune(config: ConfigDict, workdir: str) -> dict:
    """Fine-tunes the whole network as for transfer to other data (appendix B.8): trains with a grid of learning
    rates and weight decays, chooses a pair on the validation part, and trains with it once more on all training
    images. The untrained encoder beside it is trained for longer, with a grid of its own.

    Writes WORKDIR/transfer_finetune.json and shows a table.

    Returns:
      the result.

    Raises:
      Stopped: a signal has stopped it.
    """
    options = config.transfer_finetune

    def searches(kind: str) -> list[Search]:
        own = "" if kind == ENCODER else "untrained_"
        steps = options[f"{own}steps"]
        # Appendix B.8: "We divide these values of weight decay by the learning rate", that of the training.
        grid = [
            (rate, decay / scaled_learning_rate(rate, "linear", options.batch_size))
            for rate, decay in candidates(options, own)
        ]
        return [Search(1.0, Length(steps, "steps"), grid)]

    title = "Fine-tuning for transfer (appendix B.8), test"
    protocol = Protocol(
        "transfer_finetune",
        title,
        options,
        train_encoder=True,
        layer=0,
        searches=searches,
        moments=1,
        refit=True,
        sets=True,
    )
    return train_all(config, workdir, protocol)
