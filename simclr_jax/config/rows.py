"""The options of pretraining, one row each: name, default, allowed values, meaning, unit and reason.

The defaults are the paper's for ImageNet (arXiv 2002.05709, section 2.3 and appendix A). Encoders,
losses, distortions and sources list their own options beside their code.
"""

from simclr_jax import data, encoders, losses, views
from simclr_jax.encoders.heads import HEADS
from simclr_jax.options import Option, below, each, flag, number, one_of, text, whole

_MOST_IMAGES = 2**24  # of any batch

OPTIONS: tuple[Option, ...] = (
    Option(
        "seed", 0, whole(0), "decides the initial parameters, the order of images and every view"
    ),
    # What is trained and tested on.
    *data.OPTIONS,
    Option("data.image_size", 224, whole(4, 4096), "px, height and width of a view"),
    Option(
        "data.batch_size",
        4096,
        whole(2, _MOST_IMAGES),
        "B, images of the global batch: 2B views, 2B - 2 negatives an anchor",
    ),
    Option(
        "data.color_on",
        "host",
        one_of("host", "device"),
        '"device": the host only decodes, crops and resizes; the device does the rest of a view',
    ),
    Option(
        "data.placement",
        "host",
        one_of("host", "device"),
        '"device": all images lie in the device\'s memory, and the device makes the views',
    ),
    Option(
        "data.max_broken",
        0.05,
        number(0, 1),
        "share of the images that may be unreadable; they are skipped",
        resumable=True,
    ),
    Option(
        "data.eval_crop",
        0.875,
        number(0.01, 1),
        "share of the centred square's side kept in evaluation; 1.0 for small images",
        resumable=True,
    ),
    # How the two views of an image differ (paper, appendix A).
    *views.OPTIONS,
    # How the work is divided over the devices; the results do not depend on it.
    Option(
        "mesh.fsdp",
        1,
        whole(1, 2**20),
        "devices over which parameters and optimizer state are divided",
        resumable=True,
    ),
    *encoders.OPTIONS,
    Option(
        "model.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        "of the encoder's and the head's products; \"bfloat16\" on accelerators",
    ),
    Option(
        "model.norm_momentum",
        0.9,
        below(0, 1),
        "share of the running BatchNorm statistics, used in evaluation, that a step keeps",
    ),
    Option(
        "model.norm_group",
        0,
        whole(-1, _MOST_IMAGES),
        "images that share BatchNorm statistics; 0: all of the batch; -1: those of a device",
    ),
    Option(
        "model.remat",
        False,
        flag(),
        "compute blocks again in the backward pass: less memory, more time",
        resumable=True,
    ),
    # Not compared by its text when a run goes on: the record holds a digest of the weights.
    Option(
        "model.init_from",
        "",
        text(),
        "begin pretraining with these weights: a workdir, a checkpoint, or a file for --mode=import",
        resumable=True,
    ),
    Option(
        "model.init_parts",
        "encoder",
        one_of("encoder", "encoder_and_head"),
        "which of the weights of model.init_from are taken",
        resumable=True,
    ),
    Option("model.head", "nonlinear", one_of(*HEADS), "the projection head g"),
    Option(
        "model.head_layers",
        2,
        whole(1, 16),
        "layers of a nonlinear head: 2 in the paper, 3 in SimCLR v2",
    ),
    Option("model.head_width", 128, whole(1, 2**16), "width of the projection z"),
    # The record of a distillation holds a digest of its teacher.
    Option(
        "distill.teacher",
        "",
        text(),
        "for --mode=distill: the folder of a classifier: of fine-tuning, imported, or distilled",
        resumable=True,
    ),
    Option(
        "distill.temperature",
        0.1,
        number(1e-3, 1e3),
        "divides the logits of both; 0.1 for a student like its teacher, 1.0 for a smaller one (SimCLR v2)",
    ),
    Option(
        "distill.alpha",
        1.0,
        number(0, 1),
        "weight of the teacher; 1 - alpha is the weight of the labels of the training images",
    ),
    *losses.OPTIONS,
    Option(
        "optimizer.name",
        "lars",
        one_of("lars", "sgd", "adamw", "muon"),
        '"sgd" is with Nesterov momentum; "muon", for batches of up to some hundred, goes with learning_rate 0.008 and scaling none',
    ),
    Option(
        "optimizer.learning_rate",
        0.3,
        number(0, 1e6),
        'peak, before scaling; 0.075 with scaling "sqrt" in the paper',
    ),
    Option(
        "optimizer.scaling",
        "linear",
        one_of("linear", "sqrt", "none"),
        'of the learning rate: x B / 256; "sqrt": x sqrt(B) (appendix B.1)',
    ),
    Option(
        "optimizer.warmup_epochs",
        10.0,
        number(0, 1e6),
        "linear from 0, then a cosine to 0; at most half of the run",
    ),
    Option(
        "optimizer.weight_decay", 1e-6, number(0, 1e6), "the paper's; 1e-4 in the published code"
    ),
    Option(
        "optimizer.momentum",
        0.9,
        below(0, 1),
        "share of earlier gradients that a step keeps, by lars, sgd and muon (0.95 there)",
    ),
    Option("optimizer.trust_coefficient", 0.001, number(0, 1e6), "of lars"),
    Option("train.epochs", 100.0, number(0, 1e9), "passes over the training split"),
    Option("train.steps", 0, whole(0), "above 0: overrides train.epochs"),
    Option(
        "train.log_every_steps", 50, whole(1), "steps that reported metrics are means over", True
    ),
    Option(
        "health.every_steps",
        0,
        whole(0),
        "steps between measurements of the rank and uniformity of h and z, of 2,048 images; 0: none",
        True,
    ),
    Option(
        "train.report",
        False,
        flag(),
        "end with WORKDIR/report.html, a page about the run; needs the extra [report]",
        True,
    ),
    Option(
        "train.sinks",
        (),
        each(one_of("wandb", "mlflow")),
        "where metrics go besides metrics.jsonl and TensorBoard",
        True,
    ),
    Option(
        "train.objective",
        "contrastive",
        one_of("contrastive", "supervised"),
        '"supervised": trains f by the labels of the same views, as the paper does beside SimCLR (Table 1); '
        "the contrastive loss is only watched",
    ),
    Option(
        "train.microbatches",
        1,
        whole(1, 2**16),
        "above 1: the gradient of the whole batch with the activations of one of these parts",
    ),
    Option(
        "train.skip_not_finite",
        False,
        flag(),
        "skip, and count, steps whose loss or gradient is not finite",
    ),
    Option(
        "train.hang_seconds",
        1800.0,
        number(0, 1e6),
        "without a step (not counting compilation and evaluation; ten times as many while saving), after which "
        "every process writes its stacks to WORKDIR/hung and ends; 0: never",
        True,
    ),
    Option(
        "train.online_classifier",
        True,
        flag(),
        "train a linear classifier along on h, where labels exist; it does not change f",
    ),
    Option(
        "checkpoint.every_steps", 1000, whole(1), "steps between saves; the last is saved", True
    ),
    Option("checkpoint.keep_last", 3, whole(1), "newest checkpoints that are kept", True),
    Option(
        "checkpoint.keep_every_steps",
        0,
        whole(0),
        "above 0: checkpoints at multiples of this are kept for ever",
        True,
    ),
)
