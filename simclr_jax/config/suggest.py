"""Settings for a folder of images that nobody has tuned anything on, each with its reason."""

from typing import Any, NamedTuple

# From this many images on, an accelerator gets the paper's optimizer, and fine-tuning the paper's epochs and rates.
_MANY = 100_000


class Choice(NamedTuple):
    """An option, its value, and why."""

    option: str
    value: Any
    reason: str


def suggest_options(
    count: int, short_side: int, accelerator: bool, sample_bits: int = 0
) -> dict[str, Any]:
    """Chooses the options of `suggest_settings`, `suggest_evaluation` and `suggest_transfer_finetune`, {option: value}."""
    chosen = suggest_settings(count, short_side, accelerator, sample_bits)
    chosen += suggest_evaluation(count, accelerator)
    options = {choice.option: choice.value for choice in chosen}
    return options | suggest_transfer_finetune(count, accelerator)


def suggest_settings(
    count: int,
    short_side: int,
    accelerator: bool,
    sample_bits: int = 0,
    given_size: int | None = None,
) -> list[Choice]:
    """Chooses options for training on `count` images.

    Args:
      count: images.
      short_side: shorter side of the median image, pixels.
      accelerator: True: there is a GPU or TPU; False: two CPU cores, which are to finish in a quarter of
        an hour.
      sample_bits: bits that the brightest of the grey images of 16 bits needs; 0: there are none.
      given_size: the size of the views, pixels, that the other options are to fit; None: the one that is chosen.
    """
    sizes = (32, 64, 96, 128, 224) if accelerator else (32,)
    # A view shows a part of the image, so it may be a little larger than the image is.
    size = max([s for s in sizes if s <= 1.4 * short_side], default=sizes[0])
    chosen = [
        Choice(
            "data.image_size",
            size,
            f"the median image's shorter side has {short_side} px"
            + ("" if accelerator else ", and a CPU has time for no more"),
        )
    ]
    size = given_size or size
    if sample_bits:
        why = "one scale for all images of 16 bits, by the brightest of up to 32"
        chosen.append(Choice("data.sample_bits", sample_bits, why))
    if not accelerator and size <= 64:
        chosen.append(Choice("model.stem", "strided", "halves the resolution once: for CPUs"))
    elif size <= 32:
        chosen.append(Choice("model.stem", "cifar", "keeps all of 32 px (paper, appendix B.9)"))
    elif size <= 128:
        chosen.append(
            Choice("model.stem", "strided", "halves the resolution once: 64 px end as 4 x 4")
        )
    else:
        chosen.append(Choice("model.stem", "imagenet", "the paper's for 224 px"))
    if size <= 64:
        chosen.append(Choice("views.blur_probability", 0.0, "as in the paper for 32 px"))
    if size <= 32:
        chosen.append(Choice("views.color_strength", 0.5, "the paper's for 32 px"))
        # This and the paper's (0.08, 1) by AdamW, 10 labels per class, other settings equal: emoji 42.2 % (3 seeds) and
        # 40.1 % (2), digits at 32 px 97.9 % (2) and 97.1 % (3), Fashion-MNIST 71.7 and 71.5 % (1).
        chosen.append(Choice("views.crop_area", (0.2, 1.0), "smaller crops of 32 px show nothing"))
        # By the validation part better than the paper's 0.5 on letters, by a standard error or less on CIFAR-10 and clip
        # art, and worse on none by as much (docs/evaluate.md).
        chosen.append(Choice("loss.temperature", 0.2, "the paper's 0.5 for 32 px learns less here"))
    if size <= 64:
        chosen.append(Choice("data.eval_crop", 1.0, "small images are not cropped in evaluation"))
    if accelerator:
        epochs = round(min(1000, max(100, 100 * (1.28e6 / count) ** 0.5)))
        why = "100 for ImageNet's 1.28 M images, more for fewer: by the square root"
    else:
        epochs = round(min(300, max(10, 4e5 / count)))
        why = "400,000 images in all, a quarter of an hour on two cores; more is better"
        if not 10 < epochs < 300:
            why = f"{epochs * count:,} images in all; from 10 to 300 epochs, of 400,000 images where that fits"
    chosen += _model(accelerator)
    chosen += _papers_optimizer() if accelerator and count >= _MANY else _optimizer(epochs)
    most = 256 if size > 64 or not accelerator else 512
    # Two thirds: room for images that data.test_fraction or data.max_broken leaves out.
    least = min(64, max(2, _power_of_2(2 * count // 3)))
    batch = _batch_size(count, least, most)
    steps = f"{count / batch:.3g} steps an epoch"
    chosen.append(
        Choice(
            "data.batch_size",
            batch,
            f"{steps}; a power of 2 from {least} to {most}, with 32 steps an epoch or more if possible",
        )
    )
    return [*chosen, Choice("train.epochs", float(epochs), why)]


def suggest_evaluation(count: int, accelerator: bool) -> list[Choice]:
    """Chooses options for every evaluation of an encoder on `count` labelled images; `accelerator`: see
    `suggest_settings`. The paper's for ImageNet would be one step on a thousand images.
    """
    neighbours = min(200, max(5, count // 100))
    batch = _batch_of_evaluation(count, accelerator)
    why = f"{count / batch:.3g} steps an epoch"
    chosen = [
        Choice("eval.knn_k", neighbours, "a hundredth of the images, 5 to 200"),
        Choice("linear.batch_size", batch, why),
        Choice("finetune.batch_size", batch, why),
    ]
    if count >= _MANY:
        return chosen
    # At least some 150, 250 and 1,000 steps with 1 %, 10 % and all of the labels.
    epochs = tuple(
        float(round(max(least, steps * batch / (share * count))))
        for share, steps, least in ((0.01, 150, 60), (0.1, 250, 30), (1.0, 1000, 30))
    )
    return [
        *chosen,
        Choice("finetune.epochs", epochs, "150, 250 and 1,000 steps or more"),
        # Alone, 0.2 left emoji with 10 % of the labels no better than training on the labels alone (3 seeds).
        Choice(
            "finetune.learning_rate",
            (0.05, 0.2),
            "x batch / 256; the validation part chooses",
        ),
    ]


def suggest_transfer_finetune(count: int, accelerator: bool) -> dict[str, Any]:
    """Chooses {option: value} for fewer than `_MANY` images: two learning rates and two weight decays of the paper's grid
    (appendix B.8), about 30 epochs, and twice as many steps for an untrained encoder. The paper's 20,000 steps for each of
    7 x 8 settings would take weeks on a CPU. For more images {}: the defaults, which are the paper's. The arguments are
    those of `suggest_evaluation`.
    """
    if count >= _MANY:
        return {}
    batch = _batch_of_evaluation(count, accelerator)
    steps = max(1000, round(30 * count / batch))  # 30 epochs, as the paper's fine-tuning
    return {
        "transfer_finetune.batch_size": batch,
        "transfer_finetune.steps": steps,
        "transfer_finetune.learning_rate": (0.01, 0.1),
        "transfer_finetune.weight_decay": (1e-6, 1e-4),
        "transfer_finetune.untrained_steps": 2 * steps,
        "transfer_finetune.untrained_learning_rate": (0.1, 1.0),
        "transfer_finetune.untrained_weight_decay": (1e-5, 1e-3),
    }


def _batch_size(count: int, least: int, most: int) -> int:
    """Returns a power of 2 that makes 32 steps or more of an epoch, where the bounds allow it."""
    return max(least, min(most, _power_of_2(count // 32)))


def _batch_of_evaluation(count: int, accelerator: bool) -> int:
    return _batch_size(count, min(64, _power_of_2(count)), 4096 if accelerator else 256)


def _power_of_2(number: int) -> int:
    """Returns the largest power of 2 that is at most `number`, but 1 at least."""
    return 2 ** (max(1, number).bit_length() - 1)


def _model(accelerator: bool) -> list[Choice]:
    if accelerator:
        return [
            Choice("model.depth", 50, "the paper's"),
            Choice("model.dtype", "bfloat16", "accelerators are made for it"),
        ]
    return [
        Choice("model.depth", 10, "for CPUs"),
        Choice("model.width", 0.5, "for CPUs"),
        Choice("model.zero_init_residual", False, "learns faster in a short run"),
    ]


def _papers_optimizer() -> list[Choice]:
    """Chooses LARS, with the rate for batches of some hundred."""
    return [
        Choice("optimizer.scaling", "sqrt", "better than linear at small batches (B.1)"),
        Choice("optimizer.learning_rate", 0.075, "x sqrt(batch), the paper's (B.1)"),
    ]


def _optimizer(epochs: int) -> list[Choice]:
    """Chooses Muon.

    Muon against LARS by the paper's rule on emoji, batch 64, seed 0, 10 labels per class and all labels: 54.0, 68.2 %
    against 49.2, 64.2 % with the settings for a CPU, all 136 epochs; 47.9, 63.9 % against 43.2, 64.0 % with ResNet-50
    at 32 px, 12 epochs. There a step takes 1.9 times as long on a CPU: the cost of Muon's products does not grow with
    the batch, and this batch is small.
    """
    return [
        Choice(
            "optimizer.name",
            "muon",
            "needs no large batch; first of four optimizers in short runs, see docs/findings.md",
        ),
        Choice("optimizer.learning_rate", 8e-3, "for muon"),
        Choice("optimizer.momentum", 0.95, "for muon"),
        Choice("optimizer.scaling", "none", "for muon"),
        Choice("optimizer.weight_decay", 1e-4, "for muon"),
        # Where fewer epochs are given it is at most half of them. Less does not help: a tenth, emoji, 8 epochs, 3 seeds,
        # 10 labels per class, all labels, 20-NN: 44.8, 61.7, 57.1 % beside 44.5, 61.8, 57.7 %.
        Choice(
            "optimizer.warmup_epochs",
            min(5.0, epochs / 10),
            f"a tenth of {epochs} epochs, 5 at most",
        ),
    ]
