"""Every option of a run, once: its default, its unit, and why it is there.

A file in configs/ states only its differences from these defaults, which are the paper's for
ImageNet (arXiv 2002.05709, section 2.3 and appendix A). The command line overrides single options:
`--config.data.batch_size=512`. The set of options is locked, so a misspelt one is an error.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from simclr_jax.errors import UserError
from simclr_jax.optimizer import scaled_learning_rate
from simclr_jax.resnet import POOL_PADDINGS, STAGES, STEMS


def default() -> ConfigDict:
    """All options with their defaults, locked."""
    c = ConfigDict()
    c.seed = 0  # of the initial parameters, the order of the images and every view

    c.data = ConfigDict()
    c.data.source = "tfds"  # "tfds", "folder", "arrays" (.npz) or "synthetic"
    c.data.name = ""  # of the TFDS data set
    c.data.path = ""  # TFDS's data folder ("": its own), the folder of images, or the .npz
    c.data.test_path = ""  # folder of test images; "": a folder has no test split, so no probe
    c.data.train_split = "train"  # of the TFDS data set
    c.data.test_split = "test"  # of the TFDS data set, for every evaluation; "": there is none
    c.data.folder_labels = False  # the first folder below data.path is the image's class
    c.data.image_size = 224  # px, height and width of a view
    c.data.batch_size = 4096  # B, images of the global batch: 2B views, 2B - 2 negatives an anchor
    c.data.color_on = "host"  # "device": the host only decodes, crops and resizes; same views
    c.data.placement = "host"  # "device": all images lie in its memory, and all is done there
    c.data.max_broken = 0.05  # share of a folder's images that may be unreadable; they are skipped
    c.data.eval_crop = 0.875  # share of the centred square kept in evaluation; 1.0 for small images

    # How the two views of an image differ (paper, appendix A).
    c.views = ConfigDict()
    c.views.crop_area = (0.08, 1.0)  # share of the image's area, uniform
    c.views.crop_aspect = (3 / 4, 4 / 3)  # width / height, log-uniform
    c.views.flip = True  # left-right, with probability 0.5
    c.views.color_strength = 1.0  # s; 0.8 s for all but hue, 0.2 s. 0.5 for CIFAR
    c.views.jitter_probability = 0.8  # of the whole jitter, in a random order of its four parts
    c.views.grey_probability = 0.2  # of dropping all colour
    c.views.brightness = "additive"  # the paper's code; "multiplicative" is the later code's
    c.views.blur_probability = 0.5  # sigma in [0.1, 2] px, kernel size / 10; 0 for small images

    # How the work is divided over the devices; the results do not depend on it.
    c.mesh = ConfigDict()
    c.mesh.fsdp = 1  # parameters and optimizer state are divided over this many devices

    c.model = ConfigDict()
    c.model.depth = 50  # 10, 18, 34, 50, 101, 152 or 200 layers
    c.model.width = 1.0  # multiplies every layer's channels
    c.model.stem = "imagenet"  # "cifar" up to 32 px (appendix B.9); "strided" halves once, for CPUs
    c.model.pool_padding = "same"  # of the stem, the published code's; "symmetric": torchvision's
    c.model.dtype = "float32"  # of convolutions; "bfloat16" on accelerators
    c.model.norm_momentum = 0.9  # of the running BatchNorm statistics, which evaluation uses
    c.model.norm_group = 0  # images that share BatchNorm statistics; 0: all; -1: those of a device
    c.model.remat = False  # compute blocks again in the backward pass: less memory, more time
    c.model.head = "nonlinear"  # projection head: "none", "linear" or "nonlinear"
    c.model.head_layers = 2  # of a nonlinear head: 2 in the paper, 3 in SimCLR v2
    c.model.head_width = 128  # of the projection z

    c.loss = ConfigDict()
    c.loss.temperature = 0.1  # tau; 0.5 for CIFAR (appendix B.9)
    c.loss.implementation = "auto"  # "dense"; "chunked" in tiles; "auto" by the batch's size

    c.optimizer = ConfigDict()
    c.optimizer.name = "lars"  # "lars", "sgd" (Nesterov) or "adamw"
    c.optimizer.learning_rate = 0.3  # before scaling; 0.075 with scaling "sqrt"
    c.optimizer.scaling = "linear"  # x B / 256; "sqrt": x sqrt(B) (appendix B.1); "none"
    c.optimizer.warmup_epochs = 10.0  # linear from 0, then cosine to 0; at most half of the run
    c.optimizer.weight_decay = 1e-6  # the paper's; 1e-4 in the later code
    c.optimizer.momentum = 0.9  # of lars and sgd
    c.optimizer.trust_coefficient = 0.001  # of lars

    c.train = ConfigDict()
    c.train.epochs = 100.0  # passes over the training split
    c.train.steps = 0  # above 0: overrides epochs
    c.train.log_every_steps = 50  # metrics are means over this many steps
    c.train.microbatches = 1  # above 1: the gradient of all of B with the memory of one of these
    c.train.skip_not_finite = False  # skip, and count, steps whose loss or gradient is not finite
    c.train.online_classifier = True  # trains along on h, where labels exist

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 1000  # besides the last step
    c.checkpoint.keep_last = 3  # as many of the newest are kept
    c.checkpoint.keep_every_steps = 0  # above 0: multiples of this are kept for ever

    c.eval = ConfigDict()
    c.eval.batch_size = 256  # images of the global batch that get their features at once
    c.eval.validation_fraction = 0.1  # of the training split, to choose on; 0 for SGD: no choice
    c.eval.labels_per_class = (1, 10)  # few-label probes
    c.eval.label_fraction = 0.01  # one more few-label probe: this share of the training split
    c.eval.seeds = 5  # draws of the few labels
    c.eval.baselines = True  # evaluate the untrained encoder, and raw pixels, beside the encoder
    c.eval.l2 = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # candidates for the probe
    c.eval.max_iterations = 200  # of L-BFGS
    c.eval.knn_k = 200  # neighbours, or as many as there are
    c.eval.knn_temperature = 0.1  # a neighbour of similarity s weighs exp(s / temperature)

    # Linear evaluation by SGD, --mode=linear (appendix B.6).
    c.linear = ConfigDict()
    c.linear.batch_size = 4096  # images, each cropped at random
    c.linear.epochs = 90.0  # of the training split, less its validation part
    c.linear.learning_rate = (0.1,)  # x batch / 256; of several the validation part chooses one
    c.linear.weight_decay = (0.0,)  # the same
    c.linear.momentum = 0.9  # Nesterov's

    # Training of the whole network with all labels or few, --mode=finetune (appendix B.5).
    c.finetune = ConfigDict()
    c.finetune.label_fractions = (0.01, 0.1, 1.0)  # of each class's labels
    c.finetune.epochs = (60.0, 30.0, 30.0)  # for each fraction, over the images with these labels
    c.finetune.from_layer = 0  # of the projection head; 0: h; 1 in SimCLR v2 (arXiv 2006.10029)
    c.finetune.batch_size = 4096  # images, each cropped at random
    c.finetune.learning_rate = (0.05,)  # x batch / 256; of several the validation part chooses one
    c.finetune.weight_decay = (0.0,)  # the same
    c.finetune.momentum = 0.9  # Nesterov's
    return c.lock()


CHOICES = {
    "data.source": ("tfds", "folder", "arrays", "synthetic"),
    "data.color_on": ("host", "device"),
    "data.placement": ("host", "device"),
    "views.brightness": ("additive", "multiplicative"),
    "model.depth": tuple(STAGES),
    "model.stem": tuple(STEMS),
    "model.pool_padding": tuple(POOL_PADDINGS),
    "model.dtype": ("float32", "bfloat16"),
    "model.head": ("none", "linear", "nonlinear"),
    "loss.implementation": ("auto", "dense", "chunked"),
    "optimizer.name": ("lars", "sgd", "adamw"),
    "optimizer.scaling": ("linear", "sqrt", "none"),
}

# option: (lowest, highest) allowed.
_RANGES = {
    "seed": (0, 2**31 - 1),
    "data.image_size": (4, 4096),
    "data.batch_size": (2, 2**24),
    "data.eval_crop": (0.01, 1),
    "data.max_broken": (0, 1),
    "views.color_strength": (0, 2),
    "views.jitter_probability": (0, 1),
    "views.grey_probability": (0, 1),
    "views.blur_probability": (0, 1),
    "mesh.fsdp": (1, 2**20),
    "model.norm_group": (-1, 2**24),
    "model.width": (1 / 64, 64),
    "model.norm_momentum": (0, 1),
    "model.head_layers": (1, 16),
    "model.head_width": (1, 2**16),
    "loss.temperature": (1e-3, 1e3),
    "optimizer.learning_rate": (0, 1e6),
    "optimizer.warmup_epochs": (0, 1e6),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.momentum": (0, 1),
    "train.epochs": (0, 1e9),
    "train.steps": (0, 2**31 - 1),
    "train.microbatches": (1, 2**16),
    "train.log_every_steps": (1, 2**31 - 1),
    "checkpoint.every_steps": (1, 2**31 - 1),
    "checkpoint.keep_last": (1, 2**31 - 1),
    "checkpoint.keep_every_steps": (0, 2**31 - 1),
    "eval.batch_size": (1, 2**24),
    "eval.validation_fraction": (0, 0.9),
    "eval.label_fraction": (0, 1),
    "eval.seeds": (1, 1000),
    "eval.max_iterations": (1, 10**6),
    "eval.knn_k": (1, 10**6),
    "eval.knn_temperature": (1e-3, 1e3),
    "linear.batch_size": (1, 2**24),
    "linear.epochs": (0, 1e6),
    "linear.momentum": (0, 1),
    "finetune.from_layer": (0, 16),
    "finetune.batch_size": (1, 2**24),
    "finetune.momentum": (0, 1),
}

# Options that do not change what is learned (some only the order of a sum): a run may go on with
# others.
_MAY_CHANGE = (
    "train.log_every_steps",
    "mesh.",
    "model.remat",
    "loss.implementation",
    "checkpoint.",
    "eval.",
    "linear.",
    "finetune.",
    "data.eval_crop",
    "data.max_broken",
    "data.test_",
    "data.path",
)


def load(spec: str | None, overrides: Sequence[str], saved: dict | None = None) -> ConfigDict:
    """The configuration of a run, validated and locked.

    Args:
      spec: "FILE.py" or "FILE.py:ARGUMENT"; None: `saved`.
      overrides: "--config.a.b=value", each.
      saved: the configuration that a workdir was made with.

    Raises:
      UserError: a file or option is not there, or a value is not allowed.
    """
    config = read_file(spec) if spec else from_dict(saved or {})
    config = override(config, overrides)
    validate(config)
    return config


def read_file(spec: str) -> ConfigDict:
    """Runs `get_config(ARGUMENT)` of a configuration file "FILE.py[:ARGUMENT]"."""
    path, _, argument = spec.partition(":")
    if not pathlib.Path(path).is_file() or not path.endswith(".py"):
        raise UserError(
            f"no configuration file {path!r}: expected --config=configs/NAME.py[:ARGUMENT]"
        )
    module_spec = importlib.util.spec_from_file_location("simclr_jax_config_file", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return module.get_config(argument)
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        message = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(f"{spec}: {message}") from error


def parse_argument(argument: str, **allowed: type) -> dict:
    """The argument "depth=50,width=2" of a configuration file as {"depth": 50, "width": 2.0}.

    Args:
      argument: after the colon of --config=FILE.py:ARGUMENT; may be empty.
      allowed: the names, each with the type that reads its value.
    """
    values = {}
    for item in filter(None, argument.split(",")):
        name, _, value = item.partition("=")
        if name not in allowed:
            raise ValueError(
                f"unknown argument {item!r}: expected any of {', '.join(allowed)}, as NAME=VALUE"
            )
        values[name] = allowed[name](value)
    return values


def from_dict(values: dict) -> ConfigDict:
    """A locked configuration from nested plain values, as `config.to_dict()` or JSON give them."""
    config = default()
    known = flatten(config)
    for name, value in flatten(ConfigDict(values)).items():
        if name not in known:
            raise UserError(
                f"the saved configuration has the option {name!r}, which is not known here"
            )
        *groups, last = name.split(".")
        holder = config
        for group in groups:
            holder = holder[group]
        holder[last] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
    return config


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies "--config.a.b=value" flags; each value is read as the type of the option's default."""
    known = flatten(config)
    overrides = _join_values(overrides)
    for flag in overrides:
        name = flag.partition("=")[0].removeprefix("--config.")
        if not flag.startswith("--config.") or "=" not in flag:
            raise UserError(f"unknown argument {flag!r}: options are given as --config.NAME=VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            near += [
                k
                for k in known
                if k.rpartition(".")[2] == name.rpartition(".")[2] and k not in near
            ]
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise UserError(f"unknown option {name!r}{hint}")
    values, argv = flags.FlagValues(), ["simclr_jax", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError, SyntaxError) as error:
        raise UserError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error
    return values["config"].value


def _join_values(arguments: Sequence[str]) -> list[str]:
    """["--config.a", "1"] to ["--config.a=1"]; what is joined already passes."""
    joined: list[str] = []
    for argument in arguments:
        if joined and "=" not in joined[-1] and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def validate(config: ConfigDict) -> None:
    """Raises a UserError for the first value that no run could use."""
    options = flatten(config)
    for name, choices in CHOICES.items():
        if options[name] not in choices:
            raise UserError(
                f"{name}={options[name]!r}: expected one of {', '.join(map(str, choices))}"
            )
    for name, (low, high) in _RANGES.items():
        if not low <= options[name] <= high:
            raise UserError(f"{name}={options[name]}: expected {low:g} to {high:g}")
    for name, top in (("views.crop_area", 1.0), ("views.crop_aspect", 100.0)):
        value = options[name]
        if len(value) != 2 or not 0 < value[0] <= value[1] <= top:
            raise UserError(f"{name}={value}: expected (low, high) with 0 < low <= high <= {top:g}")
    if config.train.steps == 0 and config.train.epochs == 0:
        raise UserError("train.epochs=0 and train.steps=0: set one of them")
    for name in ("linear", "finetune"):
        group = config[name]
        if not (group.learning_rate and group.weight_decay):
            raise UserError(f"{name}.learning_rate and {name}.weight_decay: expected at least one")
    fractions, epochs = config.finetune.label_fractions, config.finetune.epochs
    if len(fractions) != len(epochs) or not all(0 < f <= 1 for f in fractions):
        raise UserError(
            f"finetune.label_fractions={fractions} and finetune.epochs={epochs}: expected fractions "
            "in (0, 1], and as many numbers of epochs"
        )
    layers = {"none": 0, "linear": 1, "nonlinear": config.model.head_layers}[config.model.head]
    if config.finetune.from_layer > layers:
        raise UserError(
            f"finetune.from_layer={config.finetune.from_layer}: the projection head has {layers} "
            "layers"
        )
    if config.data.source == "tfds" and not config.data.name:
        raise UserError("data.name is empty: expected the name of a TFDS data set")
    if config.data.source in ("folder", "arrays") and not config.data.path:
        raise UserError(f"data.path is empty: expected where the {config.data.source} are")


def flatten(config: ConfigDict, prefix: str = "") -> dict:
    """{"a.b": value} of a nested configuration."""
    flat: dict = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(old: ConfigDict, new: ConfigDict, may_change: Sequence[str] = ()) -> list[str]:
    """The options that change what is learned and differ, as "name: old -> new".

    `may_change`: beginnings of more names that are let through.
    """
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in after
        if before[name] != after[name] and not name.startswith((*_MAY_CHANGE, *may_change))
    ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a configuration comes to for a data set of a certain size.

    Attributes:
      steps: of the whole run.
      warmup_steps: of these, with a rising learning rate.
      learning_rate: its peak.
    """

    steps: int
    warmup_steps: int
    learning_rate: float


def plan(config: ConfigDict, count: int) -> Plan:
    """Epochs to steps, for a training split of `count` images."""
    steps_per_epoch = count / config.data.batch_size
    steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    warmup = round(config.optimizer.warmup_epochs * steps_per_epoch)
    rate = scaled_learning_rate(
        config.optimizer.learning_rate, config.optimizer.scaling, config.data.batch_size
    )
    return Plan(steps, min(warmup, steps // 2), rate)
