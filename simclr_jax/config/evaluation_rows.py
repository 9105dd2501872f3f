"""The options of evaluation, one row each. A resumed run may change all of them: none changes what is learned."""

from simclr_jax.options import Option, each, flag, number, one_of, whole

_MOST_IMAGES = 2**24  # of any batch

_RATES = each(number(1e-9, 1e6), least=1)
_DECAYS = each(number(0, 1e6), least=1)


def _logarithmic(low: float, high: float, count: int) -> tuple[float, ...]:
    """Returns `count` powers of ten, with evenly spaced exponents from `low` to `high`."""
    step = (high - low) / (count - 1)
    return tuple(float(f"{10 ** (low + i * step):.4g}") for i in range(count))


_ROWS = (
    Option(
        "eval.after_training",
        "probe",
        one_of("probe", "knn", "none"),
        "evaluation that ends pretraining, where the data have labels",
    ),
    Option(
        "eval.on_the_way",
        "knn",
        one_of("knn", "probe"),
        "evaluation that pretraining runs every eval.every_steps or eval.every_epochs",
    ),
    Option("eval.every_steps", 0, whole(0), "steps between evaluations on the way; 0: none"),
    Option(
        "eval.every_epochs",
        0.0,
        number(0, 1e9),
        "epochs between evaluations on the way, rounded to steps; 0: as eval.every_steps says",
    ),
    Option(
        "eval.batch_size",
        256,
        whole(1, _MOST_IMAGES),
        "images embedded at once, all devices; at least 16 a device, or this if it is less",
    ),
    Option(
        "eval.validation_fraction",
        0.1,
        number(0, 0.9),
        "of the training split, to choose settings on; 0: linear and finetune choose nothing",
    ),
    Option(
        "eval.labels_per_class",
        (1, 10),
        each(whole(1)),
        "labels of each class, few-label probes",
    ),
    Option(
        "eval.label_fraction",
        0.01,
        number(0, 1),
        "one more few-label probe: this share of the training split; 0: none",
    ),
    Option("eval.seeds", 5, whole(1, 1000), "draws of the few labels"),
    Option(
        "eval.baselines",
        True,
        flag(),
        "evaluate the untrained encoder and raw pixels beside the encoder",
    ),
    Option(
        "eval.l2",
        (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        each(number(0, 1e6), least=1),
        "candidates for the probe's regularisation",
    ),
    Option("eval.max_iterations", 200, whole(1, 10**6), "of L-BFGS"),
    Option("eval.knn_k", 200, whole(1, 10**6), "neighbours, at most the training images"),
    Option(
        "eval.knn_temperature",
        0.1,
        number(1e-3, 1e3),
        "a neighbour of similarity s weighs exp(s / temperature)",
    ),
    # Linear evaluation by SGD, --mode=linear (appendix B.6).
    Option("linear.batch_size", 4096, whole(1, _MOST_IMAGES), "images, each cropped at random"),
    Option(
        "linear.epochs",
        90.0,
        number(0, 1e6),
        "over the training split, less its validation part",
    ),
    Option(
        "linear.learning_rate",
        (0.1,),
        each(number(0, 1e6), least=1),
        "x batch / 256; of several the validation part chooses one",
    ),
    Option(
        "linear.weight_decay",
        (0.0,),
        each(number(0, 1e6), least=1),
        "of several the validation part chooses one",
    ),
    Option("linear.momentum", 0.9, number(0, 1), "Nesterov's"),
    # Training of the whole network with all labels or few, --mode=finetune (appendix B.5).
    Option(
        "finetune.label_fractions",
        (0.01, 0.1, 1.0),
        each(number(0, 1)),
        "of each class's labels",
    ),
    Option(
        "finetune.epochs",
        (60.0, 30.0, 30.0),
        each(number(0, 1e6)),
        "for each label fraction, over the images with these labels",
    ),
    Option(
        "finetune.from_layer",
        0,
        whole(0, 16),
        "layer of the head that is classified; 0: h; 1 in SimCLR v2 (arXiv 2006.10029)",
    ),
    Option("finetune.batch_size", 4096, whole(1, _MOST_IMAGES), "images, each cropped at random"),
    Option(
        "finetune.learning_rate",
        (0.05,),
        each(number(0, 1e6), least=1),
        "scaled by finetune.scaling; of several the validation part chooses one",
    ),
    Option(
        "finetune.scaling",
        "linear",
        one_of("linear", "sqrt"),
        "of the learning rate: x batch / 256 (B.5) or x sqrt(batch) (SimCLR v2: 0.005)",
    ),
    Option(
        "finetune.optimizer",
        "sgd",
        one_of("sgd", "lars"),
        '"sgd" with Nesterov momentum (B.5); "lars" in SimCLR v2',
    ),
    Option(
        "finetune.weight_decay",
        (0.0,),
        each(number(0, 1e6), least=1),
        "of several the validation part chooses one",
    ),
    Option("finetune.momentum", 0.9, number(0, 1), "Nesterov's; of LARS plain"),
    Option(
        "eval.features",
        "h",
        one_of("h", "z"),
        "what probe, knn and transfer evaluate: h, or z, the output of the projection head",
    ),
    Option(
        "eval.metric",
        "auto",
        one_of("auto", "accuracy", "mean_per_class", "11_point_map"),
        "what transfer and transfer_finetune choose by; auto: what the paper reports (B.8.1)",
    ),
    # Fine-tuning for transfer, --mode=transfer_finetune (appendix B.8).
    Option("transfer_finetune.steps", 20_000, whole(1), "of each training from the encoder"),
    Option(
        "transfer_finetune.learning_rate",
        _logarithmic(-4, -1, 7),
        _RATES,
        "x batch / 256; of several the validation part chooses one",
    ),
    Option(
        "transfer_finetune.weight_decay",
        (0.0, *_logarithmic(-6, -3, 7)),
        _DECAYS,
        "divided by the learning rate; of several the validation part chooses one",
    ),
    Option("transfer_finetune.untrained_steps", 40_000, whole(1), "from the untrained encoder"),
    Option(
        "transfer_finetune.untrained_learning_rate",
        _logarithmic(-3, 0, 7),
        _RATES,
        "the untrained encoder's, x batch / 256",
    ),
    Option(
        "transfer_finetune.untrained_weight_decay",
        _logarithmic(-5, -1.5, 8),
        _DECAYS,
        "the untrained encoder's, divided by the learning rate",
    ),
    Option(
        "transfer_finetune.batch_size",
        256,
        whole(1, _MOST_IMAGES),
        "images, each cropped at random",
    ),
    Option("transfer_finetune.momentum", 0.9, number(0, 1), "Nesterov's"),
)

OPTIONS = tuple(row._replace(resumable=True) for row in _ROWS)
