"""Tests of what a configuration comes to, what is unusual about it, and where metrics go."""

import functools
import shutil
import sys
import types
from typing import Any

import pytest

from simclr_jax import assemble, config
from simclr_jax.config.rows import OPTIONS
from simclr_jax.errors import UserError
from simclr_jax.modes import explain as explain_mode
from simclr_jax.modes.compile import compile_for
from simclr_jax.modes.explain import explain
from simclr_jax.modes.oddities import oddities
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.training import loop
from simclr_jax.training.sinks import SINKS


def of_imagenet(**options):
    c = config.default()
    config.set_options(c, {name.replace("__", "."): value for name, value in options.items()})
    return oddities(c, assemble.plan_of(c, 1_281_167), 1_281_167)


def test_the_papers_recipe_is_not_unusual():
    assert of_imagenet() == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data__batch_size": 32, "optimizer__name": "sgd"}, "62 negatives"),
        ({"optimizer__scaling": "none"}, "0.3 x B / 256 = 4.8 and 0.075 x sqrt(B) = 4.8 for 4096"),
        ({"optimizer__learning_rate": 1.0}, "learning rate 16: the paper's rules are"),
        ({"data__batch_size": 128}, "optimizer.name=lars at batch 128"),
        ({"optimizer__name": "adamw"}, "learning rate 4.8 with adamw"),
        (
            {"data__image_size": 32, "model__stem": "cifar"},
            "views.blur_probability above 0 at 32 px",
        ),
        (
            {"train__steps": 1000},
            "optimizer.warmup_epochs=10 is 3128 steps of 1000: it is cut to 500",
        ),
        ({"views__color_strength": 0.0, "views__grey_probability": 0.0}, "no colour distortion"),
        (
            {
                "views__crop_area": (1.0, 1.0),
                "views__flip": False,
                "views__color_strength": 0.0,
                "views__grey_probability": 0.0,
                "views__blur_probability": 0.0,
            },
            "both views of an image are one picture",
        ),
        (
            {
                "views__one_branch": True,
                "views__flip": False,
                "views__color_strength": 0.0,
                "views__grey_probability": 0.0,
                "views__blur_probability": 0.0,
            },
            "both views of an image are one picture",
        ),
        ({"loss__temperature": 0.01}, "loss.temperature=0.01"),
        (
            {"loss__temperature": 1.0, "loss__normalize": False},
            "loss.normalize=False the paper tries 10 to 100 (Table 5)",
        ),
        ({"loss__memory": 313 * 4096}, "more than 1281167 images: earlier views of an image"),
        (
            {"train__steps": 50, "optimizer__warmup_epochs": 0.0},
            "50 steps: enough to see that it runs",
        ),
        ({"data__image_size": 64, "views__blur_probability": 0.0}, "leaves 2 px"),
    ],
)
def test_what_is_unusual_is_said_with_its_reason(options, says):
    (line,) = of_imagenet(**options)
    assert says in line


def test_of_training_by_labels_no_loss_of_z_is_unusual(tiny):
    config.set_options(tiny, {"loss.temperature": 0.01, "train.objective": "supervised"})
    said = " ".join(oddities(tiny, assemble.plan_of(tiny, 48), 48))
    assert "loss.temperature" not in said
    assert "negatives" not in said
    tiny.train.objective = "contrastive"
    said = " ".join(oddities(tiny, assemble.plan_of(tiny, 48), 48))
    assert "loss.temperature" in said
    assert "negatives" in said


@pytest.mark.parametrize("mode", ["explain", "compile"])
def test_a_distillation_is_not_explained_as_a_pretraining(tiny, tmp_path, mode):
    (tmp_path / "config.json").write_text('{"mode": "distill", "config": {}, "plan": {}}')
    runs: dict[str, Any] = {
        "explain": explain,
        "compile": functools.partial(compile_for, topology="v5e:2x2"),
    }
    with pytest.raises(UserError, match=rf"holds a distillation, and --mode={mode} is about"):
        runs[mode](tiny, str(tmp_path))


@pytest.mark.whole
def test_a_run_is_explained_and_nothing_is_written(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explain_mode, "_MEASURED_SECONDS", 0.5)
    config.set_options(
        tiny, {"data.placement": "host", "eval.every_steps": 4, "eval.on_the_way": "knn"}
    )
    found = explain(tiny, str(tmp_path / "w"))
    said = capsys.readouterr().out
    for text in (
        "images      12 x 12, 3 channels; views made on the host",
        "shapes      views [16, 2, 12, 12, 3], h [32, 16]",
        "every 4 steps, 2 kept",
        "evaluation  knn every 4 steps; probe at the end",
        "of a device's memory as the compiler plans it",
        " an epoch, ",
        "unusual     data.batch_size=16",
    ):
        assert text in said
    assert len(found) == 4  # the batch, lars at it, no colour, and 8 steps
    assert not (tmp_path / "w").exists()
    monkeypatch.setattr(explain_mode, "_memory", lambda device: 1000)
    monkeypatch.setattr(explain_mode, "measure_e2e", None)
    assert explain(tiny, str(tmp_path / "w")) == found
    assert (
        "speed       not measured: a device here has 0.0 MB; --topology=" in capsys.readouterr().out
    )


# Weights & Biases and MLflow


class Recorded:
    """Stands for either library."""

    def __init__(self):
        self.began, self.lines, self.closed = [], [], []

    def wandb(self):
        def init(**how):
            self.began.append((how["id"], how["config"]["train.steps"]))
            return types.SimpleNamespace(
                define_metric=lambda *_, **__: None,
                log=lambda values: self.lines.append(values),
                finish=lambda exit_code: self.closed.append(exit_code == 0),
            )

        return types.SimpleNamespace(init=init)

    def mlflow(self):
        def start_run(run_id, run_name):
            self.began.append((run_id or "first", 8))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="first"))

        return types.SimpleNamespace(
            start_run=start_run,
            log_params=lambda params: None,
            log_metrics=lambda values, step: self.lines.append({"step": step} | values),
            end_run=lambda status: self.closed.append(status == "FINISHED"),
        )


@pytest.mark.whole
@pytest.mark.parametrize("name", SINKS)
def test_metrics_go_to_a_sink_and_a_resumed_run_goes_on_there(tiny, tmp_path, monkeypatch, name):
    """Its checkpoint of step 4 is the newest when it goes on."""
    seen = Recorded()
    monkeypatch.setitem(sys.modules, name, getattr(seen, name)())
    config.set_options(tiny, {"train.sinks": (name,), "train.steps": 8})
    pretrain(tiny, str(tmp_path / "w"))
    shutil.rmtree(tmp_path / "w/checkpoints/8")
    pretrain(tiny, str(tmp_path / "w"))
    first, second = seen.began
    assert second == first if name == "wandb" else second[0] == "first"
    assert [line["step"] for line in seen.lines] == [2, 4, 6, 8, 6, 8]
    assert seen.lines[3]["loss"] == seen.lines[5]["loss"]
    assert seen.closed == [True, True]


def test_a_sink_that_fails_is_left_and_the_training_goes_on(tiny, tmp_path, monkeypatch, capsys):
    seen = Recorded()
    library = seen.mlflow()

    def refuse(values, step):
        raise ConnectionError("no\nnetwork")

    library.log_metrics = refuse
    monkeypatch.setitem(sys.modules, "mlflow", library)
    monkeypatch.setitem(sys.modules, "wandb", seen.wandb())
    tiny.train.sinks = ("mlflow", "wandb")
    pretrain(tiny, str(tmp_path / "w"))
    assert capsys.readouterr().out.count("no more metrics to mlflow: no network") == 1
    assert [line["step"] for line in seen.lines] == [2, 4, 6, 8]
    assert seen.closed == [False, True]  # closed: MLflow has one open run in a process


def test_a_training_that_fails_is_closed_as_failed(tiny, tmp_path, monkeypatch):
    seen = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", seen.wandb())
    monkeypatch.setattr(loop, "check_state", lambda *_: (_ for _ in ()).throw(UserError("bad")))
    tiny.train.sinks = ("wandb",)
    with pytest.raises(UserError, match="bad"):
        pretrain(tiny, str(tmp_path / "w"))
    assert seen.closed == [False]


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_that_is_not_there_is_one_line(tiny, tmp_path, monkeypatch, name):
    tiny.train.sinks = (name,)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=f"train.sinks={name} needs its library: pip install {name}"
    ):
        pretrain(tiny, str(tmp_path / "w"))

    def refuses(**_):
        raise RuntimeError("no\nkey")

    broken = types.SimpleNamespace(init=refuses, start_run=refuses)
    monkeypatch.setitem(sys.modules, name, broken)
    with pytest.raises(UserError, match=f"train.sinks={name} cannot begin: no key"):
        pretrain(tiny, str(tmp_path / "w"))


def test_the_option_names_all_sinks():
    (option,) = (option for option in OPTIONS if option.name == "train.sinks")
    assert option.allowed.holds(tuple(SINKS))
    assert not option.allowed.holds(("tensorboard",))
