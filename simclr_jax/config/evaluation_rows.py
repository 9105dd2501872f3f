"""The options of evaluation, one row each. A resumed run may change all of them: none changes what is learned."""

from simclr_jax.options import Option, below, each, flag, number, one_of, whole

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
        "evaluation that runs during pretraining, every eval.every_steps or eval.every_epochs",
    ),
    Option(
        "eval.every_steps", 0, whole(0), "steps between two evaluations during pretraining; 0: none"
    ),
    Option(
        "eval.every_epochs",
        0.0,
        number(0, 1e9),
        "epochs between two evaluations during pretraining, rounded to steps; 0: eval.every_steps "
        "decides",
    ),
    Option(
        "eval.batch_size",
        256,
        whole(1, _MOST_IMAGES),
        "images embedded at once by all devices together; each device takes at least 16 of them, or at least as many as "
        "this option says if that is less than 16",
    ),
    Option(
        "eval.validation_fraction",
        0.1,
        number(0, 0.9),
        "share of the training split on which evaluations choose their settings; 0: linear and "
        "finetune choose nothing",
    ),
    Option(
        "eval.labels_per_class",
        (1, 10),
        each(whole(1)),
        "labels of each class in the probes with few labels, one probe for each number",
    ),
    Option(
        "eval.label_fraction",
        0.01,
        number(0, 1),
        "one more probe with few labels: this share of the training split; 0: none",
    ),
    Option(
        "eval.seeds",
        5,
        whole(1, 1000),
        "how many times the few labels are drawn (of one training); results are means over the draws",
    ),
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
        "strengths of the probe's regularisation that the validation part chooses from",
    ),
    Option(
        "eval.max_iterations",
        200,
        whole(1, 10**6),
        "greatest number of iterations of L-BFGS, in probe and transfer",
    ),
    Option(
        "eval.knn_k",
        200,
        whole(1, 10**6),
        "how many neighbours vote; at most the number of training images",
    ),
    Option(
        "eval.knn_temperature",
        0.1,
        number(1e-3, 1e3),
        "divides the similarity s of a neighbour, whose vote weighs exp(s / temperature)",
    ),
    # Linear evaluation by SGD, --mode=linear (appendix B.6).
    Option(
        "linear.batch_size",
        4096,
        whole(1, _MOST_IMAGES),
        "images in a batch, each cropped at random",
    ),
    Option(
        "linear.epochs",
        90.0,
        number(0, 1e6),
        "passes over the training split without its validation part",
    ),
    Option(
        "linear.learning_rate",
        (0.1,),
        each(number(0, 1e6), least=1),
        "peak learning rate, x batch / 256; of several the validation part chooses one",
    ),
    Option(
        "linear.weight_decay",
        (0.0,),
        each(number(0, 1e6), least=1),
        "weight decay of the classifier's kernel; of several the validation part chooses one",
    ),
    Option(
        "linear.momentum",
        0.9,
        below(0, 1),
        "share of earlier gradients that a step keeps (Nesterov momentum)",
    ),
    # Training of the whole network with all labels or few, --mode=finetune (appendix B.5).
    Option(
        "finetune.label_fractions",
        (0.01, 0.1, 1.0),
        each(number(0, 1)),
        "shares of each class's labels that are trained on, one training for each share",
    ),
    Option(
        "finetune.epochs",
        (60.0, 30.0, 30.0),
        each(number(0, 1e6)),
        "passes over the images that have a label, one number for each of finetune.label_fractions",
    ),
    Option(
        "finetune.from_layer",
        0,
        whole(0, 16),
        "layer of the projection head that the classifier sits on; 0: h; 1 in SimCLR v2 (arXiv "
        "2006.10029)",
    ),
    Option(
        "finetune.batch_size",
        4096,
        whole(1, _MOST_IMAGES),
        "images in a batch, each cropped at random",
    ),
    Option(
        "finetune.learning_rate",
        (0.05,),
        each(number(0, 1e6), least=1),
        "peak learning rate before finetune.scaling; of several the validation part chooses one",
    ),
    Option(
        "finetune.scaling",
        "linear",
        one_of("linear", "sqrt"),
        "how the learning rate grows with the batch: x batch / 256 (B.5) or x sqrt(batch) (SimCLR v2, "
        "with 0.005)",
    ),
    Option(
        "finetune.optimizer",
        "sgd",
        one_of("sgd", "lars"),
        '"sgd": with Nesterov momentum (B.5); "lars": as in SimCLR v2',
    ),
    Option(
        "finetune.weight_decay",
        (0.0,),
        each(number(0, 1e6), least=1),
        "weight decay of the kernels; of several the validation part chooses one",
    ),
    Option(
        "finetune.momentum",
        0.9,
        below(0, 1),
        "share of earlier gradients that a step keeps: Nesterov momentum with sgd, plain momentum "
        "with lars",
    ),
    Option(
        "eval.features",
        "h",
        one_of("h", "z"),
        "features that probe, knn and transfer evaluate: h, or z, the output of the projection head",
    ),
    Option(
        "eval.metric",
        "auto",
        one_of("auto", "accuracy", "mean_per_class", "11_point_map"),
        "metric by which transfer and transfer_finetune choose; auto: the metric that the paper "
        "reports for the data set (B.8.1)",
    ),
    # Fine-tuning for transfer, --mode=transfer_finetune (appendix B.8).
    Option(
        "transfer_finetune.steps",
        20_000,
        whole(1),
        "steps of each training that begins with the encoder",
    ),
    Option(
        "transfer_finetune.learning_rate",
        _logarithmic(-4, -1, 7),
        _RATES,
        "peak learning rates, x batch / 256, of which the validation part chooses one",
    ),
    Option(
        "transfer_finetune.weight_decay",
        (0.0, *_logarithmic(-6, -3, 7)),
        _DECAYS,
        "weight decays of which the validation part chooses one; each is divided by the learning rate as "
        "scaled by the batch",
    ),
    Option(
        "transfer_finetune.untrained_steps",
        40_000,
        whole(1),
        "steps of each training that begins with the untrained encoder",
    ),
    Option(
        "transfer_finetune.untrained_learning_rate",
        _logarithmic(-3, 0, 7),
        _RATES,
        "peak learning rates for the untrained encoder, x batch / 256",
    ),
    Option(
        "transfer_finetune.untrained_weight_decay",
        _logarithmic(-5, -1.5, 8),
        _DECAYS,
        "weight decays for the untrained encoder, each divided by the learning rate as scaled by the batch",
    ),
    Option(
        "transfer_finetune.batch_size",
        256,
        whole(1, _MOST_IMAGES),
        "images in a batch, each cropped at random",
    ),
    Option(
        "transfer_finetune.momentum",
        0.9,
        below(0, 1),
        "share of earlier gradients that a step keeps (Nesterov momentum)",
    ),
)

OPTIONS = tuple(row._replace(resumable=True) for row in _ROWS)
