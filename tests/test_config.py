"""Options, overrides and what they come to."""

import json
import pathlib

import pytest

from simclr_jax import config
from simclr_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    "spec",
    [
        "digits.py",
        "fashion_mnist.py",
        "cifar10.py",
        "cifar10.py:resnet18",
        "imagenet.py",
        "imagenet.py:depth=101,width=2,epochs=1000",
        "folder.py:/data/photos",
    ],
)
def test_every_configuration_file_is_valid_and_is_itself_after_saving(spec):
    c = config.read_file(str(CONFIGS / spec))
    config.validate(c)
    again = config.from_dict(json.loads(json.dumps(c.to_dict())))
    assert config.flatten(again) == config.flatten(c)


def test_every_configuration_file_was_tested():
    tested = {"digits", "fashion_mnist", "cifar10", "imagenet", "folder"}
    assert {p.stem for p in CONFIGS.glob("*.py")} == tested


def test_arguments_of_configuration_files():
    c = config.read_file(str(CONFIGS / "imagenet.py:depth=101,width=2,epochs=1000"))
    assert (c.model.depth, c.model.width, c.train.epochs) == (101, 2.0, 1000.0)
    assert config.read_file(str(CONFIGS / "cifar10.py:resnet18")).model.depth == 18
    assert config.read_file(str(CONFIGS / "folder.py:/a/b")).data.path == "/a/b"


def test_the_imagenet_configuration_is_the_papers():
    """Section 2.3: B 4096, LARS, 4.8 = 0.3 x 4096 / 256, decay 1e-6, 10 epochs of warm-up."""
    plan = config.plan(config.read_file(str(CONFIGS / "imagenet.py")), 1_281_167)
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
        ("folder.py", "which folder"),
        ("digits.py:x", "unknown argument"),
    ],
)
def test_bad_files_and_arguments_say_what_was_expected(spec, says):
    with pytest.raises(UserError, match=says):
        config.read_file(str(CONFIGS / spec))


def test_overrides_are_read_as_the_type_of_the_default():
    c = config.override(
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
        config.override(config.default(), [flag])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.depth", 51, "10, 18, 34, 50, 101, 152, 200"),
        ("loss.temperature", 0.0, "0.001 to 1000"),
        ("data.batch_size", 1, "2 to"),
        ("views.crop_area", (0.5, 0.1), "low <= high"),
        ("views.crop_area", (0.5, 1.5), "low <= high"),
        ("optimizer.name", "adam", "lars, sgd, adamw"),
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


def test_every_option_has_its_reason_beside_it():
    lines = pathlib.Path(config.__file__).read_text().split("\n")
    options = [line for line in lines if line.startswith("    c.") and "ConfigDict()" not in line]
    named = set(config.flatten(config.default()))
    assert {line.split("=")[0].strip()[2:] for line in options} == named
    assert [line for line in options if "  # " not in line] == []


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
    assert config.plan(c, 100) == config.Plan(40, 10, pytest.approx(0.3 * 10 / 256))
    c.train.steps = 12
    assert config.plan(c, 100).steps == 12
    assert config.plan(c, 100).warmup_steps == 6


def test_every_configuration_file_says_what_it_reaches_and_its_command():
    for path in CONFIGS.glob("*.py"):
        text = path.read_text()
        assert f"python -m simclr_jax.main --config=configs/{path.name}" in text
        assert "%" in text or path.name == "folder.py"
        assert any(word in text for word in ("Hardware", "CPU", "GPU"))
