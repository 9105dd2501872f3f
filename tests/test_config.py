"""Options, overrides and what they come to."""

import ast
import json
import math
import pathlib
import pickle
import re
from typing import Any

import pytest

import simclr_jax
from simclr_jax import assemble, config, shell
from simclr_jax.config import OPTIONS, suggest
from simclr_jax.config.__main__ import page
from simclr_jax.config.overrides import load, override
from simclr_jax.config.python_files import read_file, split_argument
from simclr_jax.errors import UserError
from simclr_jax.training.plan import Plan

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


SPECS = [
    "digits.py",
    "digits.py:vit",
    "emoji.py",
    "tinted.py",
    "fashion_mnist.py",
    "fashion_mnist.py:gpu",
    "cifar10.py",
    "cifar10.py:resnet18",
    "cifar10.py:cpu",
    "imagenet.py",
    "imagenet.py:depth=101,width=2,epochs=1000",
    "imagenet_v2.py",
    "imagenet_v2.py:depth=152,width=3,sk=1",
    "folder.py:/data/photos",
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_configuration_file_is_valid_and_is_itself_after_saving(spec):
    c = read_file(str(CONFIGS / spec))
    config.validate(c)
    again = config.from_dict(json.loads(json.dumps(c.to_dict())))
    assert config.flatten(again) == config.flatten(c)


def test_every_configuration_file_was_tested():
    assert {p.name for p in CONFIGS.glob("*.py")} == {spec.partition(":")[0] for spec in SPECS}


def test_arguments_of_configuration_files():
    c = read_file(str(CONFIGS / "imagenet.py:depth=101,width=2,epochs=1000"))
    assert (c.model.depth, c.model.width, c.train.epochs) == (101, 2.0, 1000.0)
    assert read_file(str(CONFIGS / "cifar10.py:resnet18")).model.depth == 18
    assert read_file(str(CONFIGS / "folder.py:/a/b")).data.path == "/a/b"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("configs/folder.py:/a/b", ("configs/folder.py", "/a/b")),
        ("folder:/a/b.py", ("folder", "/a/b.py")),
        ("imagenet", ("imagenet", "")),
        ("/run:1/mine.py", ("/run:1/mine.py", "")),
        ("/run:1/mine.py:x", ("/run:1/mine.py", "x")),
        ("loss:paper", ("loss", "paper")),
    ],
)
def test_a_file_or_name_and_its_argument(spec, expected):
    assert split_argument(spec) == expected


def test_the_configuration_of_v2_is_the_published_one():
    """LARS at 0.1 x sqrt(4096), 5 % of the epochs as warm-up; fine-tuning at 0.005 x sqrt(1024), of larger networks at less."""
    c = read_file(str(CONFIGS / "imagenet_v2.py:depth=152,width=3,sk=1"))
    plan = assemble.plan_of(c, 1_281_167)
    assert plan.learning_rate == pytest.approx(6.4)
    assert plan.warmup_steps == round(40 * 1_281_167 / 4096)
    shorter = load(str(CONFIGS / "imagenet_v2.py"), ["--config.train.epochs=100"])
    assert shorter.optimizer.warmup_epochs == 5
    assert assemble.encoder(c).describe() == "SK-ResNet-152 x3"
    assert assemble.head(c).layers == 3
    assert (c.finetune.optimizer, c.finetune.scaling) == ("lars", "sqrt")
    assert (c.finetune.learning_rate, c.finetune.batch_size) == ((0.002, 0.005), 1024)
    assert shorter.finetune.learning_rate == (0.005,)


@pytest.mark.parametrize("name", ["tensorflow", "tensorflow_datasets.core"])
def test_a_missing_tensorflow_is_one_line(name):
    error = shell._without_tensorflow(ModuleNotFoundError("x", name=name))
    assert f"the package {name} is not installed" in str(error)
    assert "data.placement=device" in str(error)
    assert shell._without_tensorflow(ModuleNotFoundError("x", name="numpy")) is None
    assert shell._without_tensorflow(ValueError("x")) is None


def test_a_file_that_may_not_be_read_is_one_line():
    def command(_):
        raise PermissionError(13, "Permission denied", "W/config.json")

    with pytest.raises(
        SystemExit, match=r"^error: W/config\.json: Permission denied: ask its owner"
    ):
        shell.call(command, [])


def test_the_imagenet_configuration_is_the_papers():
    """Section 2.3: B 4096, LARS, 4.8 = 0.3 x 4096 / 256, decay 1e-6, 10 epochs of warm-up."""
    plan = assemble.plan_of(read_file(str(CONFIGS / "imagenet.py")), 1_281_167)
    assert plan.learning_rate == pytest.approx(4.8)
    assert plan.steps == round(100 * 1_281_167 / 4096)
    assert plan.warmup_steps == round(10 * 1_281_167 / 4096)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere.py", "no configuration file"),
        ("imagenet.py:dept=3", "depth"),
        ("imagenet.py:depth=x", "invalid literal"),
        ("cifar10.py:resnet9", "resnet18"),
        ("folder.py", "which images"),
        ("digits.py:x", "unknown argument"),
    ],
)
def test_bad_files_and_arguments_say_what_was_expected(spec, says):
    with pytest.raises(UserError, match=says):
        read_file(str(CONFIGS / spec))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.train.steps=abc"], r"^train\.steps=abc: expected a whole number from 0 to"),
        (["--config.data.image_size=32.5"], r"^data\.image_size=32\.5: expected a whole number"),
        (
            ["--config.data.batch_size=64", "--config.train.report=no"],
            r"^train\.report=no: expected True or False$",
        ),
        (["--config.train.report"], r"^--config\.train\.report has no value: expected --config"),
        (["--config.train.epochs=1", "20"], "^unknown argument '20': options are given as"),
        (
            ["--config.data.batchsize=4"],
            r"^unknown option 'data\.batchsize'; near names: data\.batch",
        ),
    ],
)
def test_flags_that_cannot_be_read_name_the_option_and_its_values(flags, says):
    with pytest.raises(UserError, match=says):
        override(config.default(), flags)


def test_blanks_around_the_sign_are_no_mistake():
    for flags in (["=", "20"], ["=20"], ["20"]):
        c = override(config.default(), ["--config.train.epochs", *flags])
        assert c.train.epochs == 20
    assert override(config.default(), ["--config.train.epochs=", "20"]).train.epochs == 20


def test_overrides_are_read_as_the_type_of_the_default():
    c = override(
        config.default(),
        [
            "--config.data.batch_size=64",
            "--config.loss.temperature=1",
            "--config.views.flip=False",
            "--config.views.crop_area=(0.5,1.0)",
            "--config.model.stem",
            "cifar",
        ],
    )
    assert c.data.batch_size == 64
    assert c.loss.temperature == 1.0
    assert isinstance(c.loss.temperature, float)
    assert c.views.flip is False
    assert c.views.crop_area == (0.5, 1.0)
    assert c.model.stem == "cifar"
    assert config.default().data.batch_size == 4096


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.data.batchsize=64", "data.batch_size"),
        ("--config.temperature=1", "loss.temperature"),
        ("--config.data.batch_size=many", "batch_size"),
        ("--batch_size=4", "--config.NAME=VALUE"),
        ("stray", "--config.NAME=VALUE"),
    ],
)
def test_unknown_options_name_the_near_ones(flag, says):
    with pytest.raises(UserError, match=says) as caught:
        override(config.default(), [flag])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.depth", 51, "10, 18, 34, 50, 101, 152, 200"),
        ("loss.temperature", 0.0, "0.001 to 1000"),
        ("data.batch_size", 1, "2 to"),
        ("views.crop_area", (0.5, 0.1), "low <= high"),
        ("views.crop_area", (0.5, 1.5), "low <= high"),
        ("views.crop_area", (1e-12, 1e-12), "low <= high"),
        ("views.crop_area", ("a", "b"), "low <= high"),
        ("eval.l2", (), "1 or more values"),
        ("eval.l2", ("abc",), "each a number from 0"),
        ("eval.l2", (-1.0,), "each a number from 0"),
        ("eval.l2", (math.nan,), "each a number from 0"),
        ("eval.labels_per_class", (-1,), "each a whole number from 1"),
        ("eval.labels_per_class", (0.5,), "each a whole number from 1"),
        ("model.norm_momentum", 1.0, "0 to below 1"),
        ("optimizer.momentum", 1.0, "0 to below 1"),
        ("finetune.momentum", 1.0, "0 to below 1"),
        ("optimizer.trust_coefficient", math.nan, "0 to 1e"),
        ("optimizer.learning_rate", math.inf, "0 to 1e"),
        ("finetune.epochs", (30.0,), "one number of epochs for each"),
        ("finetune.label_fractions", (0.0, 0.1, 1.0), "fractions above 0"),
        ("finetune.label_fractions", (0.1, 0.1, 1.0), "one or more different fractions"),
        ("finetune.from_layer", 3, "the projection head has 2 layers"),
        ("optimizer.name", "adam", "lars, sgd, adamw, muon"),
        ("data.name", "", "TFDS"),
        ("data.source", "arrays", "data.path"),
        ("train.epochs", 0.0, "set one"),
    ],
)
def test_values_that_no_run_could_use_are_refused(name, value, says):
    c = config.default()
    c.data.name = "cifar10"
    group, option = name.split(".")
    c[group][option] = value
    with pytest.raises(UserError, match=says):
        config.validate(c)


def test_the_name_of_a_data_set_that_would_not_be_read_is_refused():
    saved = config.default()
    saved.data.source, saved.data.path, saved.data.test_fraction = "folder", "/photos", 0.1
    says = r"source=folder does not .*: add --config\.data\.source=tfds .*path= .*test_fraction=0$"
    with pytest.raises(UserError, match=says) as caught:
        load(None, ["--config.data.name=cifar10"], saved.to_dict())
    with pytest.raises(UserError, match=says):
        simclr_jax.evaluate("knn", "", saved, **{"data.name": "cifar10"})
    more = str(caught.value).partition(": add ")[2].split()
    found = load(None, ["--config.data.name", "cifar10", *more], saved.to_dict())
    assert (found.data.name, found.data.source, found.data.path) == ("cifar10", "tfds", "")
    # A configuration for TFDS may be given files instead.
    assert load("cifar10", ["--config.data.source=arrays", "--config.data.path=x.npz"]).data.name


def test_every_option_is_one_row_with_its_reason_and_its_default_is_allowed():
    names = [option.name for option in OPTIONS]
    assert len(set(names)) == len(names)
    assert set(config.flatten(config.default())) == set(names)
    for option in OPTIONS:
        assert option.why, option.name
        assert option.problem(option.default) is None, option.name


def test_no_option_takes_a_value_of_another_type():
    """True is no number, and 1 is no flag."""
    for option in OPTIONS:
        for wrong in (None, [], object(), b"x"):
            assert option.problem(wrong), option.name
        if not isinstance(option.default, bool):
            assert option.problem(True), option.name
        else:
            assert option.problem(1), option.name


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_number_and_every_element_of_a_tuple_is_checked(option):
    """In each place of a tuple alone, and as the whole value."""
    default: Any = option.default
    never: list = [math.nan, math.inf, -math.inf, None, b"x"]
    if isinstance(default, tuple):
        elements = [*never, True, "abc", -1, -1e-3, 1e300, (1,)]
        never += [1, 0.5, "abc", list(default)]
        for place in range(max(1, len(default))):
            never += [(*default[:place], x, *default[place + 1 :]) for x in elements]
    elif isinstance(default, bool):
        never += [0, "True", (True,)]
    elif isinstance(default, int):
        never += [4.5, "4", -2, 2**40, (4,)]
    elif isinstance(default, float):
        never += ["0.5", -1, -1e-3, 1e300, (0.5,)]
    else:
        never += [1, 0.5, ("lars",)]
        never += ["", "nothing", default.upper()] if "one of" in option.allowed.text else []
    for value in never:
        problem = option.problem(value)
        assert problem == f"{option.name}={value!r}: expected {option.allowed.text}", value


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("eval.l2=('abc',)", "eval.l2=('abc',): expected a tuple of 1 or more values, each a num"),
        ("eval.l2=(1e-3,-1)", "eval.l2=(0.001, -1): expected a tuple"),
        ("eval.labels_per_class=(1,True)", "eval.labels_per_class=(1, True): expected a tuple"),
        ("loss.temperature=nan", "loss.temperature=nan: expected a number from 0.001 to 1000"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate=inf: expected a number"),
        ("train.steps=-1", "train.steps=-1: expected a whole number from 0"),
        ("views.crop_area=(0.5,)", "views.crop_area=(0.5,): expected (low, high) with"),
    ],
)
def test_values_on_the_command_line_are_checked(flag, says):
    with pytest.raises(UserError) as caught:
        load(str(CONFIGS / "digits.py"), [f"--config.{flag}"])
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_values_of_another_type_are_refused_by_name():
    """As Python code, or a saved configuration that was changed by hand, may give them."""
    for name, value in (("train.steps", "8"), ("train.steps", 8.5), ("views.flip", 1)):
        with pytest.raises(UserError, match=f"{name}={value!r}: expected "):
            config.set_options(config.default(), {name: value})
    with pytest.raises(UserError, match="seed='0': expected a whole number"):
        config.from_dict({"seed": "0"})


def test_the_page_of_options_is_the_one_that_is_printed():
    """docs/options.md: python -m simclr_jax.config > docs/options.md"""
    assert (CONFIGS.parent / "docs" / "options.md").read_text() == page()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "def get_config(_):\n    return None\n",
            "get_config returned None: expected a ConfigDict",
        ),
        ("def get_config(_):\n    assert False\n", "file.py, line 2: AssertionError"),
        ("def get_config(_):\n    return 1 / 0\n", "file.py, line 2: ZeroDivisionError: division"),
        ("import nowhere\n", "file.py, line 1: ModuleNotFoundError"),
        ("def get_config(:\n", "file.py, line 1: SyntaxError"),
        ("x = 1\n", "file.py defines no get_config: expected"),
        (
            "from simclr_jax import config\ndef get_config(_):\n    c = config.default()\n"
            "    c.data.batchsize = 4\n    return c\n",
            'file.py, line 4: AttributeError: Key "batchsize" does not exist and cannot be added since the config is locked. '
            'Did you mean "batch_size" instead of "batchsize"?',
        ),
    ],
)
def test_a_mistake_in_a_configuration_file_is_named_with_its_line(tmp_path, content, says):
    path = tmp_path / "file.py"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_file(str(path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_of_a_configuration_file_can_be_looked_up(tmp_path):
    """Dataclasses look up their module by name, and pickle does; two files have two modules."""
    for name, width in (("a", 3), ("b", 4)):
        (tmp_path / f"{name}.py").write_text(
            "from __future__ import annotations\nimport dataclasses\nfrom typing import ClassVar\n"
            "from simclr_jax import config\n@dataclasses.dataclass\nclass Own:\n"
            f"    name: ClassVar[str] = 'own'\n    width: int = {width}\n"
            "def get_config():\n    c = config.default()\n    c.data.name = 'x'\n"
            "    c.unlock()\n    c.own = Own\n    return c\n"
        )
    own = [read_file(str(tmp_path / f"{name}.py")).own for name in "ab"]
    assert [pickle.loads(pickle.dumps(kind())).width for kind in own] == [3, 4]


def test_configurations_that_come_with_the_package_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("digits", []).data.name == "digits"
    assert load("imagenet:depth=101", []).model.depth == 101
    with pytest.raises(UserError, match=r"expected FILE\.py.* or one of cifar10, digits"):
        load("nowhere", [])


def test_differences_are_of_what_changes_the_result():
    old, new = config.default(), config.default()
    new.train.log_every_steps = 7
    new.checkpoint.every_steps = 7
    new.eval.seeds = 7
    assert config.differences(old, new) == []
    new.loss.temperature = 0.5
    new.seed = 2
    assert config.differences(old, new) == ["loss.temperature: 0.1 -> 0.5", "seed: 0 -> 2"]


def test_steps_override_epochs_and_warmup_is_at_most_half():
    c = config.default()
    c.data.batch_size, c.train.epochs, c.optimizer.warmup_epochs = 10, 4.0, 1.0
    assert assemble.plan_of(c, 100) == Plan(40, 10, 0.3 * 10 / 256)
    c.train.steps = 12
    assert assemble.plan_of(c, 100).steps == 12
    assert assemble.plan_of(c, 100).warmup_steps == 6


def test_every_configuration_file_says_what_it_reaches_and_its_command():
    for path in CONFIGS.glob("*.py"):
        text = path.read_text()
        assert f"python -m simclr_jax.main --config=configs/{path.name}" in text
        assert "%" in text or path.name == "folder.py"
        assert any(word in text for word in ("Hardware", "CPU", "GPU"))


def test_every_option_that_the_code_names_exists():
    """Lists of options by name, such as those that a study passes over, follow a renamed option."""
    names = {option.name for option in OPTIONS}
    groups = {name.partition(".")[0] for name in names if "." in name}
    option = re.compile(rf"(?:{'|'.join(groups)})\.[a-z_0-9.]*")
    files = (".json", ".html", ".safetensors")
    found = [
        text
        for path in pathlib.Path(simclr_jax.__file__).parent.rglob("*.py")
        for text in whole_texts(ast.parse(path.read_text()))
        if option.fullmatch(text) and not text.endswith(files)
    ]
    assert len(found) > 100
    # A text that ends in "." or "_" stands for all options that begin with it.
    unknown = {
        text
        for text in found
        if text not in names
        and not (text.endswith((".", "_")) and any(name.startswith(text) for name in names))
    }
    assert not unknown


def whole_texts(tree):
    """Returns the texts of a program, less those that are a part of an f-string."""
    nodes = list(ast.walk(tree))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in parts]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_the_defaults_are_the_published_ones():
    """Sections 2.3 and 4, appendices A and B; of the code where the paper is silent (head, BatchNorm, crops)."""
    expected = {
        "data.eval_crop": 0.875,
        "views.crop_area": (0.08, 1.0),
        "views.crop_aspect": (3 / 4, 4 / 3),
        "views.flip": True,
        "views.color_strength": 1.0,
        "views.jitter_probability": 0.8,
        "views.grey_probability": 0.2,
        "views.blur_probability": 0.5,
        "views.brightness": "additive",
        "model.depth": 50,
        "model.stem": "imagenet",
        "model.zero_init_residual": True,
        "model.pool_padding": "same",
        "model.norm_momentum": 0.9,
        "model.norm_group": 0,
        "model.head": "nonlinear",
        "model.head_layers": 2,
        "model.head_width": 128,
        "loss.name": "nt_xent",
        "loss.temperature": 0.1,
        "loss.margin": 0.8,
        "loss.memory_decay": 0.999,
        "optimizer.name": "lars",
        "optimizer.momentum": 0.9,
        "optimizer.trust_coefficient": 0.001,
        "distill.temperature": 0.1,
        "eval.validation_fraction": 0.1,
        "eval.knn_k": 200,
        "eval.knn_temperature": 0.1,
        "linear.batch_size": 4096,
        "linear.epochs": 90.0,
        "linear.learning_rate": (0.1,),
        "linear.weight_decay": (0.0,),
        "linear.momentum": 0.9,
        "finetune.batch_size": 4096,
        "finetune.label_fractions": (0.01, 0.1, 1.0),
        "finetune.epochs": (60.0, 30.0, 30.0),
        "finetune.learning_rate": (0.05,),
        "finetune.weight_decay": (0.0,),
        "finetune.momentum": 0.9,
    }
    flat = config.flatten(config.default())
    for name, value in expected.items():
        assert flat[name] == (value if isinstance(value, str) else pytest.approx(value)), name


def test_the_cifar_configuration_is_the_papers():
    """Appendix B.9: no blur, half the colour distortion, 3x3 stem, learning rate x B / 256, tau 0.5."""
    c = read_file(str(CONFIGS / "cifar10.py"))
    assert (c.views.blur_probability, c.views.color_strength, c.model.stem) == (0.0, 0.5, "cifar")
    assert (c.loss.temperature, c.optimizer.learning_rate, c.model.depth) == (0.5, 1.0, 50)
    assert (c.data.image_size, c.data.eval_crop, c.train.epochs) == (32, 1.0, 1000.0)


@pytest.mark.parametrize(
    ("accelerator", "differ"),
    [
        (
            False,
            {
                "model.stem": "strided",
                "model.depth": 10,
                "model.width": 0.5,
                "model.zero_init_residual": False,
                "data.batch_size": 256,
                "train.epochs": 10.0,
                "optimizer.warmup_epochs": 1.0,
            },
        ),
        (
            True,
            {
                "model.stem": "cifar",
                "model.depth": 50,
                "model.dtype": "bfloat16",
                "data.batch_size": 512,
                "train.epochs": 506.0,
                "optimizer.warmup_epochs": 5.0,
            },
        ),
    ],
)
def test_the_automatic_settings_are_those_that_were_measured(accelerator, differ):
    """On 50,000 images of 32 px; docs/evaluate.md has what each reaches."""
    expected = {
        "data.image_size": 32,
        "data.eval_crop": 1.0,
        "views.blur_probability": 0.0,
        "views.color_strength": 0.5,
        "views.crop_area": (0.2, 1.0),
        "loss.temperature": 0.2,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 8e-3,
        "optimizer.momentum": 0.95,
        "optimizer.scaling": "none",
        "optimizer.weight_decay": 1e-4,
        "eval.knn_k": 200,
        "finetune.learning_rate": (0.05, 0.2),
    }
    found = suggest.suggest_options(50_000, 32, accelerator)
    assert {name: found.get(name) for name in expected | differ} == expected | differ
