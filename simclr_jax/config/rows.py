"""The options of pretraining, one row each: name, default, allowed values, meaning, unit and reason.

The defaults are the paper's for ImageNet (arXiv 2002.05709, section 2.3 and appendix A). Encoders,
losses, distortions and sources list their own options beside their code.
"""

from simclr_jax import data, encoders, losses, views
from simclr_jax.encoders.heads import HEADS
from simclr_jax.options import Option, below, each, flag, number, one_of, path, whole

_MOST_IMAGES = 2**24  # of any batch

OPTIONS: tuple[Option, ...] = (
    Option(
        "seed",
        0,
        whole(0),
        "decides the initial parameters, the order of the images and every view",
    ),
    # What is trained and tested on.
    *data.OPTIONS,
    Option("data.image_size", 224, whole(4, 4096), "height and width of a view, pixels"),
    Option(
        "data.batch_size",
        4096,
        whole(2, _MOST_IMAGES),
        "B, images in the global batch: 2B views, and 2B - 2 negatives for each anchor",
    ),
    Option(
        "data.color_on",
        "host",
        one_of("host", "device"),
        'where colour is distorted; "device": the host only decodes, crops and resizes, and the '
        "device does everything after that",
    ),
    Option(
        "data.placement",
        "host",
        one_of("host", "device"),
        'where the images lie; "device": all of them in the device\'s memory, where the views are made '
        "too",
    ),
    Option(
        "data.max_broken",
        0.05,
        number(0, 1),
        "share of the images that may be unreadable before the run stops; unreadable images are "
        "skipped",
        resumable=True,
    ),
    Option(
        "data.eval_crop",
        0.875,
        number(0.01, 1),
        "share of the side of the centred square that evaluation keeps; 1.0 for small images",
        resumable=True,
    ),
    # How the two views of an image differ (paper, appendix A).
    *views.OPTIONS,
    # How the work is divided over the devices; the results do not depend on it.
    Option(
        "mesh.fsdp",
        1,
        whole(1, 2**20),
        "devices over which the parameters and the optimizer's state are divided; results do not "
        "depend on it",
        resumable=True,
    ),
    *encoders.OPTIONS,
    Option(
        "model.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        'number format of the products in encoder and head; "bfloat16" on accelerators. "float32" is as exact there '
        "as JAX's default: TF32 on newer GPUs and bfloat16 on TPUs, unless the environment has "
        "JAX_DEFAULT_MATMUL_PRECISION=highest",
    ),
    Option(
        "model.norm_momentum",
        0.9,
        below(0, 1),
        "share of the running BatchNorm statistics that a step keeps; evaluation uses them",
    ),
    Option(
        "model.norm_group",
        0,
        whole(-1, _MOST_IMAGES),
        "images that share BatchNorm statistics; 0: the whole batch; -1: the images of a device",
    ),
    Option(
        "model.remat",
        False,
        flag(),
        "compute each block again in the backward pass: less memory, more time",
        resumable=True,
    ),
    # A resumed run may name another path: the weights are compared by the digest in the run's record.
    Option(
        "model.init_from",
        "",
        path(),
        "weights that pretraining begins with: a workdir, a checkpoint, or a file that --mode=import "
        "reads",
        resumable=True,
    ),
    Option(
        "model.init_parts",
        "encoder",
        one_of("encoder", "encoder_and_head"),
        "which of the weights of model.init_from are taken",
        resumable=True,
    ),
    Option("model.head", "nonlinear", one_of(*HEADS), "projection head g"),
    Option(
        "model.head_layers",
        2,
        whole(1, 16),
        "layers of a nonlinear head: 2 in the paper, 3 in SimCLR v2",
    ),
    Option("model.head_width", 128, whole(1, 2**16), "width of the projection z"),
    # A resumed run may name another path: the teacher is compared by the digest in the run's record.
    Option(
        "distill.teacher",
        "",
        path(),
        "folder of the classifier that --mode=distill takes as the teacher: fine-tuned, imported or "
        "itself distilled",
        resumable=True,
    ),
    Option(
        "distill.temperature",
        0.1,
        number(1e-3, 1e3),
        "divides the logits of teacher and student; 0.1 for a student like its teacher, 1.0 for a "
        "smaller one (SimCLR v2)",
    ),
    Option(
        "distill.alpha",
        1.0,
        number(0, 1),
        "weight of the teacher's answers in the loss; 1 - alpha is the weight of the labels of the "
        "training images",
    ),
    *losses.OPTIONS,
    Option(
        "optimizer.name",
        "lars",
        one_of("lars", "sgd", "adamw", "muon"),
        '"lars": the paper\'s, for large batches; "sgd": with Nesterov momentum; "adamw": with scaling '
        'none and a learning_rate such as 0.002; "muon": for batches of up to some hundred, with '
        "scaling none and a learning_rate such as 0.008",
    ),
    Option(
        "optimizer.learning_rate",
        0.3,
        number(0, 1e6),
        "peak learning rate before optimizer.scaling; the paper's is 0.3, or 0.075 with scaling "
        '"sqrt"',
    ),
    Option(
        "optimizer.scaling",
        "linear",
        one_of("linear", "sqrt", "none"),
        'how the learning rate grows with the batch B; "linear": x B / 256; "sqrt": x sqrt(B) '
        "(appendix B.1)",
    ),
    Option(
        "optimizer.warmup_epochs",
        10.0,
        number(0, 1e6),
        "epochs in which the learning rate rises linearly from 0, at most half of the run; then it "
        "falls to 0 along a cosine",
    ),
    Option(
        "optimizer.weight_decay",
        1e-6,
        number(0, 1e6),
        "weight decay of the kernels; the paper's is 1e-6, the published code's 1e-4",
    ),
    Option(
        "optimizer.momentum",
        0.9,
        below(0, 1),
        "share of earlier gradients that a step of lars, sgd or muon keeps; 0.95 for muon",
    ),
    Option(
        "optimizer.trust_coefficient", 0.001, number(0, 1e6), "factor on each layer's step in lars"
    ),
    Option("train.epochs", 100.0, number(0, 1e9), "passes over the training split"),
    Option("train.steps", 0, whole(0), "steps of the training; above 0 it overrides train.epochs"),
    Option(
        "train.log_every_steps",
        50,
        whole(1),
        "steps over which a reported metric is averaged",
        True,
    ),
    Option(
        "health.every_steps",
        0,
        whole(0),
        "steps between two measurements of the rank and uniformity of h and z, on 2,048 images; 0: "
        "none",
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
        "services that get the metrics too, besides metrics.jsonl and TensorBoard",
        True,
    ),
    Option(
        "train.objective",
        "contrastive",
        one_of("contrastive", "supervised"),
        'what f learns from; "supervised": the labels of the same views, as the paper does beside '
        "SimCLR (Table 1), while the contrastive loss is only reported and the head stays at its random start",
    ),
    Option(
        "train.microbatches",
        1,
        whole(1, 2**16),
        "parts that a batch is computed in, one after the other: the gradient of the whole batch, "
        "with the activations of one part in memory",
    ),
    Option(
        "train.skip_not_finite",
        False,
        flag(),
        "skip, and count, steps whose loss, gradient, update or running statistics are not finite; False: such a step stops the run",
        resumable=True,
    ),
    Option(
        "train.hang_seconds",
        1800.0,
        number(0, 1e6),
        "seconds without a step, from the result of the first step on, after which every process writes its stacks to "
        "WORKDIR/hung and ends; evaluating does not count, a save may take ten times as long; 0: never",
        True,
    ),
    Option(
        "train.online_classifier",
        True,
        flag(),
        "train a linear classifier on h alongside, where labels exist; it does not change f",
    ),
    Option(
        "checkpoint.every_steps",
        1000,
        whole(1),
        "steps between two saves; the last step is always saved",
        True,
    ),
    Option(
        "checkpoint.keep_last", 3, whole(1), "how many of the newest checkpoints are kept", True
    ),
    Option(
        "checkpoint.keep_every_steps",
        0,
        whole(0),
        "above 0: a checkpoint at a multiple of this many steps is kept for ever",
        True,
    ),
)
