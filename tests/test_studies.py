"""Studies: their runs, their choice by validation, their claims, and the command that runs them."""

import itertools
import json
import pathlib
import re
import statistics
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import encoder_checkpoint
from etils import epath
from PIL import Image
from scipy.stats import binomtest

from simclr_jax import config
from simclr_jax.data import forget_opened
from simclr_jax.data.order import Share
from simclr_jax.data.split import BROKEN
from simclr_jax.errors import NotFinite, Stopped, UserError
from simclr_jax.evals import transformations
from simclr_jax.evals.evaluate import evaluate_features
from simclr_jax.evals.transformations import TASKS
from simclr_jax.modes import study as mode
from simclr_jax.modes.study import run_study
from simclr_jax.studies import Factor, Level, Published, Study, above, among_best, best, rises
from simclr_jax.studies.claims import sign_test
from simclr_jax.studies.figure import draw
from simclr_jax.studies.outcomes import (
    OUTCOME,
    Outcomes,
    claimed_of,
    keys_of,
    outcomes_of,
    runs_wanted,
    table_of,
)
from simclr_jax.studies.record import about_run
from simclr_jax.studies.runs import config_of, part_of, read_study, runs_of
from simclr_jax.training.verdict import HEALTH, Verdict
from simclr_jax.views import make_distortion

FILES = sorted((pathlib.Path(__file__).parent.parent / "configs/studies").glob("*.py"))

TEXT = """
from simclr_jax.studies import Factor, Level, Published, Study, above


def get_study():
    levels = {
        "tau 0.5": Level({"loss.temperature": 0.5}),
        "margin": Level({"loss.name": "margin"}, ({"loss.margin": 0.4}, {"loss.margin": 0.8})),
    }
    return Study(
        title="Losses",
        factors=(Factor("loss", levels),),
        claims=(above("tau 0.5 is above margin", ("tau 0.5",), ("margin",)),),
        published=Published("nobody", {("tau 0.5",): 60.0, ("margin",): 50.0}),
        seeds=2,
    )
"""


NAMED = """
from simclr_jax.studies import Factor, Level, Study


def get_study():
    levels = {"x": Level({})}
    readings = {"1 %": {}}
    return Study("t", (Factor("a", levels),), evaluation="finetune", readings=readings, seeds=1)
"""


EXTREMES = """
from simclr_jax.studies import Factor, Level, Study

def get_study():
    rates = {r: Level({"optimizer.learning_rate": float(r)}) for r in ("0.1", "0.2", "0.3", "0.4", "0.5")}
    return Study("Rates", (Factor("rate", rates, numbers=True),), extremes=1)
"""


@pytest.fixture
def file(tmp_path):
    """A study of three runs a seed, two seeds."""
    path = tmp_path / "losses.py"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def short(tiny):
    """Runs of two steps."""
    config.set_options(tiny, {"train.steps": 2, "eval.l2": (1e-3, 1e-1)})
    return tiny


@pytest.mark.whole
def test_a_study_is_run_shown_and_not_run_again(short, file, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "S"
    pathlib.Path(file).write_text(TEXT.replace("seeds=2", "seeds=1"))
    result = run_study(short, str(folder), file)
    said = capsys.readouterr().out
    assert "study       Losses: 3 runs, 0 finished" in said
    assert result["missing"] == []
    rows = {tuple(row["key"]): row for row in result["rows"]}
    assert set(rows) == {("tau 0.5",), ("margin",)}
    for key, row in rows.items():
        assert set(row["accuracies"]) == {0}
        for seed, accuracy in row["accuracies"].items():
            setting = f"_setting-{row['setting']}" if row["setting"] else ""
            name = f"{key[0].replace(' ', '-')}{setting}_seed-{seed}"
            probe = json.loads((folder / name / "probe.json").read_text())
            assert probe["rows"][-1]["accuracy"] == accuracy
    # Those of the first run alone.
    first = json.loads((folder / "tau-0.5_seed-0" / "probe.json").read_text())["rows"]
    beside = {row["features"]: row["accuracy"] for row in first}
    del beside["encoder"]
    assert set(beside) == {"raw pixels", "untrained encoder"}
    assert result["baselines"] == beside
    lower = sum(
        np.mean(list(row["accuracies"].values())) < beside["raw pixels"] for row in rows.values()
    )
    pixels = f"raw pixels {100 * beside['raw pixels']:.1f} % ({lower} of 2 settings "
    assert pixels in said
    table = (folder / "table.md").read_text()
    assert "| loss | accuracy, % | seeds | chosen | paper, % |" in table
    margin = (0.4, 0.8)[rows[("margin",)]["setting"]]
    assert f"| 1 | loss.margin={margin} | 50.0 |" in table
    assert "tau 0.5 is above margin" in table
    assert f"of the first run: {pixels}" in table
    assert "sign test p =" in said
    with Image.open(folder / "figure.png") as picture:
        assert min(picture.size) > 400
    assert ET.parse(folder / "figure.svg").getroot().tag.endswith("svg")
    monkeypatch.setattr(mode, "pretrain", None)  # nothing is trained again
    other = tmp_path / "other.py"
    other.write_text(pathlib.Path(file).read_text().replace("Losses", "Others"))
    with pytest.raises(UserError, match=r"study\.json is of another study, 'Losses' with"):
        run_study(short, str(folder), str(other))
    hinge = pathlib.Path(file).read_text().replace('("margin",)', '("hinge",)')
    other.write_text(hinge.replace('"margin": Level', '"hinge": Level'))
    with pytest.raises(UserError, match=r"'Losses' with the levels .*'margin'"):
        run_study(short, str(folder), str(other))
    assert run_study(short, str(folder), file) == json.loads(
        json.dumps(result),
        object_hook=lambda x: {int(k) if k.isdigit() else k: v for k, v in x.items()},
    )


def test_parts_make_the_table_of_the_whole_and_say_what_is_missing(
    short, file, tmp_path, monkeypatch, capsys
):
    trained = []

    def pretrain(own, workdir):
        trained.append(pathlib.Path(workdir).name)
        return True

    def evaluate(name, own, workdir):
        accuracy = 0.9 if own.loss.name == "nt_xent" else 0.5 + own.loss.margin / 10
        row = {"features": "encoder", "labels_per_class": None, "accuracy": accuracy}
        return {"rows": [row | {"validation_accuracy": 1 - accuracy}]}

    monkeypatch.setattr(mode, "pretrain", pretrain)
    monkeypatch.setattr(mode, "evaluate", evaluate)
    monkeypatch.setattr(mode, "draw", lambda *_: [])
    folder = str(tmp_path / "S")
    first = run_study(short, folder, file, part="1/2")
    assert len(first["missing"]) == 3
    assert "missing     3 runs" in capsys.readouterr().out
    whole = run_study(short, folder, file, part="2/2")
    assert whole["missing"] == []
    assert sorted(trained) == sorted(run.name for run in runs_of(read_study(file)))
    alone = run_study(short, str(tmp_path / "T"), file)
    assert alone == whole
    short.model.remat, short.loss.implementation = True, "chunked"
    assert run_study(short, folder, file) == whole
    # An earlier version lacked an option, which counts as at its default; a still earlier one wrote a digest.
    outcome = tmp_path / "S" / trained[0] / OUTCOME
    content = json.loads(outcome.read_text())
    del content["about"]["options"]["views.flip"]
    outcome.write_text(json.dumps(content))
    assert run_study(short, folder, file) == whole
    content["about"]["options"]["views.flip"] = not short.views.flip
    outcome.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"was made with other views\.flip: use"):
        run_study(short, folder, file)
    content["about"] = "0123"
    outcome.write_text(json.dumps(content))
    with pytest.raises(UserError, match="was made with other options, data or readings"):
        run_study(short, folder, file)
    short.loss.temperature = 0.3
    with pytest.raises(UserError, match="was made with other"):
        run_study(short, folder, file)
    # The validation part preferred the margin that is worse on the test split.
    assert {tuple(r["key"]): r["setting"] for r in whole["rows"]}[("margin",)] == 0


@pytest.fixture
def pretended(monkeypatch):
    """A study whose runs are not trained: their names; "fails", those whose loss is not finite; and "stops", those that a
    signal stops.
    """
    told: dict = {"trained": [], "fails": set(), "stops": set()}

    def pretrain(own, workdir):
        told["trained"].append(pathlib.Path(workdir).name)
        if pathlib.Path(workdir).name in told["fails"]:
            raise NotFinite("step 1: loss nan not finite.")
        if pathlib.Path(workdir).name in told["stops"]:
            raise Stopped("stopped after step 1, which is saved")
        return True

    def evaluate(name, own, workdir):
        row = {"features": "encoder", "labels_per_class": None, "accuracy": 0.5}
        return {"rows": [row | {"validation_accuracy": own.loss.margin}]}

    monkeypatch.setattr(mode, "pretrain", pretrain)
    monkeypatch.setattr(mode, "evaluate", evaluate)
    monkeypatch.setattr(mode, "draw", lambda *_: [])
    return told


def test_a_study_that_is_stopped_shows_what_is_there(short, file, tmp_path, pretended):
    last = runs_of(read_study(file))[-1].name
    pretended["stops"].add(last)
    with pytest.raises(Stopped, match="stopped after step 1"):
        run_study(short, str(tmp_path / "S"), file)
    assert json.loads((tmp_path / "S/study.json").read_text())["missing"] == [last]
    assert "| tau 0.5 | 50.0" in (tmp_path / "S/table.md").read_text()


@pytest.mark.parametrize(
    ("option", "value", "kept"),
    [
        ("train.steps", 3, False),
        ("eval.l2", (1e-2,), False),
        ("checkpoint.every_steps", 7, True),
        ("train.report", True, True),
        ("eval.batch_size", 3, True),
        ("finetune.momentum", 0.5, True),  # the probe does not read it
    ],
)
def test_finished_runs_are_kept_where_what_differs_decides_nothing(
    short, file, tmp_path, pretended, option, value, kept
):
    folder = str(tmp_path / "S")
    run_study(short, folder, file, part="1/2")
    trained = len(pretended["trained"])
    config.set_options(short, {option: value})
    if kept:
        run_study(short, folder, file, part="1/2")
        assert len(pretended["trained"]) == trained
        return
    for part in ("1/2", "2/2"):  # the runs of another part, too
        with pytest.raises(UserError, match=f"made with other {re.escape(option)}: "):
            run_study(short, folder, file, part=part)


def test_runs_on_other_images_are_not_mixed(short, file, tmp_path, pretended):
    folder, other = str(tmp_path / "S"), str(tmp_path / "other.npz")
    run_study(short, folder, file, part="1/2")
    with np.load(short.data.path) as arrays:
        content = dict(arrays)
    np.savez(other, **content)
    short.data.path = other  # a copy elsewhere
    run_study(short, folder, file, part="1/2")
    content["train_images"] = content["train_images"][::-1].copy()
    np.savez(tmp_path / "third.npz", **content)
    short.data.path = str(tmp_path / "third.npz")
    with pytest.raises(UserError, match="made with other data: "):
        run_study(short, folder, file, part="2/2")


def test_runs_of_a_level_are_told_by_the_images_that_it_names(short, tmp_path, pretended):
    with np.load(short.data.path) as arrays:
        content = dict(arrays)
    other = str(tmp_path / "other.npz")
    np.savez(other, **content)
    study = tmp_path / "data.py"
    study.write_text(
        "from simclr_jax.studies.contract import Factor, Level, Study\n"
        "def get_study(argument=''):\n"
        f"    levels = {{'one': Level({{}}), 'other': Level({{'data.path': {other!r}}})}}\n"
        "    return Study('Data', (Factor('data', levels),))\n"
    )
    folder = str(tmp_path / "S")
    run_study(short, folder, str(study))
    count = len(pretended["trained"])
    forget_opened()
    run_study(short, folder, str(study))
    assert len(pretended["trained"]) == count
    content["train_images"] = content["train_images"][::-1].copy()
    np.savez(other, **content)
    forget_opened()
    with pytest.raises(UserError, match=r"other_seed-0.* made with other data: "):
        run_study(short, folder, str(study))


def test_claims_are_open_while_a_setting_is_missing_and_pass_over_what_failed():
    """Of a level with two settings one may be finished, and one may have failed."""
    rates = Level({}, ({"optimizer.learning_rate": 0.1}, {"optimizer.learning_rate": 0.2}))
    study = Study("Rates", (Factor("optimizer", {"one": Level({}), "other": rates}),), seeds=2)
    runs = {run.name: run for run in runs_of(study)}
    others = [name for name, run in runs.items() if run.key == ("other",)]
    scores = {("one",): {0: 0.9, 1: 0.9}}

    def claimed(found, missing, failed):
        missing = [runs[name] for name in missing]
        outcomes = Outcomes(found, {}, missing, dict.fromkeys(failed, "why"), {}, {}, {})
        return claimed_of(study, outcomes)

    assert claimed(scores, others, []) == {**scores, ("other",): {}}
    first = {name for name in others if runs[name].setting == 0}
    both = {**scores, ("other",): {0: 0.5}}
    assert claimed(both, set(others) - first, []) == {**scores, ("other",): {}}
    assert claimed(both, set(others) - first, first) == {**scores, ("other",): {}}
    assert claimed(scores, [], others) == scores
    later = [name for name in others if runs[name].seed == 1]
    assert claimed(both, later, []) == both
    assert best("", ("one",), [("one",), ("other",), ("failed",)])(both).held


def test_a_damaged_outcome_is_one_line(short, file, tmp_path, pretended):
    run_study(short, str(tmp_path / "S"), file, part="1/2")
    damaged = next((tmp_path / "S").glob(f"*/{OUTCOME}"))
    damaged.write_text("")
    with pytest.raises(
        UserError, match=rf"{re.escape(str(damaged))} is damaged .*: remove it, and"
    ):
        run_study(short, str(tmp_path / "S"), file)


def test_a_run_that_does_not_stay_finite_does_not_hold_up_the_others(
    short, file, tmp_path, pretended, capsys
):
    pretended["fails"] = {"margin_setting-1_seed-0", "tau-0.5_seed-1"}
    result = run_study(short, str(tmp_path / "S"), file)
    assert len(pretended["trained"]) == 6
    assert set(result["failed"]) == pretended["fails"]
    assert "step 1: loss nan not finite" in capsys.readouterr().out
    seeds = {row["key"][0]: set(row["accuracies"]) for row in result["rows"]}
    assert seeds == {"tau 0.5": {0}, "margin": {0, 1}}
    assert result["missing"] == []
    run_study(short, str(tmp_path / "S"), file)
    assert len(pretended["trained"]) == 6  # they would fail again


def test_a_fine_tuning_that_does_not_stay_finite_does_not_hold_up_the_others(
    short, file, tmp_path, pretended, monkeypatch
):
    def evaluate(name, own, workdir):
        raise NotFinite("step 3: loss inf not finite.")

    monkeypatch.setattr(mode, "evaluate", evaluate)
    assert len(run_study(short, str(tmp_path / "S"), file)["failed"]) == 6


def test_a_setting_is_chosen_by_the_seeds_that_all_have(tmp_path):
    levels = {"x": Level({}, ({"loss.margin": 0.1}, {"loss.margin": 0.2}))}
    study = Study("t", (Factor("a", levels),))
    for setting, validations in ((0, (0.60, 0.50, 0.50)), (1, (0.59,))):
        for seed, validation in enumerate(validations):
            folder = tmp_path / (f"x_seed-{seed}" if setting == 0 else f"x_setting-1_seed-{seed}")
            folder.mkdir()
            outcome = {"readings": {"h": {"accuracy": 0.1 * setting, "validation": validation}}}
            (folder / OUTCOME).write_text(json.dumps(outcome))
    assert outcomes_of(study, epath.Path(tmp_path)).settings == {("x",): 0}
    for seed in range(3):
        (tmp_path / f"x_seed-{seed}" / OUTCOME).unlink()
    assert outcomes_of(study, epath.Path(tmp_path)).settings == {("x",): 1}  # the only one there


def test_a_level_of_epochs_counts_whatever_steps_are_given(short, tmp_path):
    study = Study("t", (Factor("a", {"4": Level({"train.epochs": 4.0})}),))
    (run, *_) = runs_of(study)
    assert short.train.steps == 2
    assert config_of(short, study, run).train.steps == 0


def test_a_probe_without_a_validation_part_is_refused_before_any_training(
    short, file, tmp_path, pretended
):
    short.eval.validation_fraction = 0.0
    with pytest.raises(UserError, match=r"eval\.validation_fraction=0: the probe chooses"):
        run_study(short, str(tmp_path / "S"), file)
    assert not pretended["trained"]


def test_gains_are_compared_seed_by_seed():
    study = read_study("model_size")
    claim = study.claims[-2]
    names = ("ResNet-10", "ResNet-10, supervised")
    wide = ({0: 0.4, 1: 0.0, 2: 0.1}, {1: 0.1, 2: 0.2})
    scores = {("0.5", name): found for name, found in zip(names, wide, strict=True)}
    scores |= {("0.125", name): {0: 0.0, 1: 0.0, 2: 0.0} for name in names}
    verdict = claim(scores)
    assert verdict.held is False
    assert "-10.0 points" in verdict.because


def test_only_the_best_and_the_worst_get_further_seeds(short, tmp_path, monkeypatch, capsys):
    file = tmp_path / "rates.py"
    file.write_text(EXTREMES)
    trained = []

    def pretrain(own, workdir):
        trained.append(pathlib.Path(workdir).name)
        return True

    def evaluate(name, own, workdir):  # the seeds after the first turn the order around
        accuracy = own.optimizer.learning_rate * (1 if own.seed == 0 else -1) + own.seed / 100
        row = {"features": "encoder", "labels_per_class": None, "accuracy": accuracy}
        return {"rows": [row | {"validation_accuracy": accuracy}]}

    monkeypatch.setattr(mode, "pretrain", pretrain)
    monkeypatch.setattr(mode, "evaluate", evaluate)
    monkeypatch.setattr(mode, "draw", lambda *_: [])
    folder = str(tmp_path / "S")
    run_study(short, folder, str(file), part="1/2")
    assert trained == ["0.1_seed-0", "0.3_seed-0", "0.5_seed-0"]  # those of part 2 may be extremes
    assert (
        "missing     2 runs, and further seeds of the best and worst 1" in capsys.readouterr().out
    )
    missing = run_study(short, folder, str(file), part="2/2")["missing"]
    assert missing == ["0.1_seed-2", "0.5_seed-2"]
    assert trained[3:] == ["0.2_seed-0", "0.4_seed-0", "0.1_seed-1", "0.5_seed-1"]
    assert "missing     2 runs:" in capsys.readouterr().out
    whole = run_study(short, folder, str(file), part="1/2")
    assert trained[7:] == ["0.1_seed-2", "0.5_seed-2"]
    assert whole["missing"] == []
    seeds = {row["key"][0]: len(row["accuracies"]) for row in whole["rows"]}
    assert seeds == {"0.1": 3, "0.2": 1, "0.3": 1, "0.4": 1, "0.5": 3}
    alone = run_study(short, str(tmp_path / "T"), str(file))
    assert alone == whole


@pytest.mark.whole
def test_a_killed_study_goes_on_where_it_was(short, file, tmp_path, monkeypatch):
    folder = str(tmp_path / "S")
    original, seen = mode.pretrain, []

    def pretrain(own, workdir):
        seen.append(workdir)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(own, workdir)

    monkeypatch.setattr(mode, "pretrain", pretrain)
    with pytest.raises(KeyboardInterrupt):
        run_study(short, folder, file)
    finished = {path.parent.name for path in pathlib.Path(folder).glob(f"*/{OUTCOME}")}
    assert len(finished) == 2
    assert run_study(short, folder, file)["missing"] == []
    assert len(seen) == 3 + 4


def test_a_dry_run_lists_the_runs_and_their_time(short, file, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(own, seconds):
        measured.append((own.loss.name, own.loss.margin))
        return [{"images_per_second": 32.0, "seconds_to_first_step": 1.0}]

    monkeypatch.setattr(mode, "measure_e2e", measure)
    assert run_study(short, str(tmp_path / "S"), file, dry_run=True) == {}
    said = capsys.readouterr().out
    # 2 steps of 16 images, and a second before the first.
    assert said.count("0:00:02  ") == 6
    assert "0:00:12  in all" in said
    assert len(measured) == len(set(measured)) == 3  # each kind of step once
    assert not (tmp_path / "S").exists()


@pytest.mark.whole
def test_the_probe_of_z_is_that_of_the_projections(tiny, tmp_path):
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    of_h = evaluate_features("probe", tiny, str(workdir))
    tiny.eval.features = "z"
    of_z = evaluate_features("probe", tiny, str(workdir))
    assert (workdir / "probe.json").exists()
    assert (workdir / "probe_z.json").exists()
    assert of_h["rows"][-1]["accuracy"] != of_z["rows"][-1]["accuracy"]
    tiny.model.head = "none"  # z is h
    plain = encoder_checkpoint(tiny, tmp_path / "v")
    of_z = evaluate_features("probe", tiny, str(plain))
    tiny.eval.features = "h"
    assert evaluate_features("probe", tiny, str(plain))["rows"] == of_z["rows"]


OF_TWO_SCALES = ("batch_epochs", "head", "lr_scaling", "model_size", "semi_supervised")


@pytest.mark.parametrize(
    "name",
    [*(path.stem for path in FILES), "head:512", *(f"{name}:paper" for name in OF_TWO_SCALES)],
)
def test_the_studies_that_come_with_the_package_are_sound(name, monkeypatch):
    monkeypatch.setattr("simclr_jax.data.tfds.is_prepared", lambda name: True)
    study = read_study(name)
    runs = runs_of(study)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs[:: 1 + len(runs) // 50]:
        config_of(digits(), study, run)
    mode._check_readings(digits(), study)
    keys = set(keys_of(study))
    if study.published:
        assert set(study.published.values) <= keys
    scores = {key: {0: 0.5 + i / 1e3, 1: 0.5} for i, key in enumerate(keys)}
    for claim in study.claims:
        assert claim(scores).held is not None, claim(scores)
        assert claim({}).held is None


def digits():
    c = config.default()
    c.data.name = "digits"
    return c


AUGMENTATIONS = ("recrop", "cutout", "color_jitter", "sobel", "noise", "blur", "rotation")


def test_pairs_of_distortions_are_on_one_branch_in_their_order():
    """And nothing else is: the flip belongs to the crop."""
    study = read_study("augment_pairs")
    kinds = dict(zip(study.factors[0].levels, AUGMENTATIONS, strict=True))
    for run in runs_of(study):
        own = make_distortion(config_of(digits(), study, run).views.to_dict())
        assert own.one_branch
        chain = [operation.NAME for operation in own.chain]
        assert chain[0] == kinds[run.key[0]]
        expected = {kinds[name] for name in run.key}
        expected |= {"flip"} if "crop" in run.key else set()
        expected |= {"grey"} if "colour" in run.key else set()
        assert set(chain) == expected


def test_a_study_of_two_factors_can_be_drawn_as_a_matrix(tmp_path):
    """With what is missing left white, and the mean of each row of what is there."""
    study = read_study("augment_pairs")
    keys = keys_of(study)
    scores = {key: {0: 0.1 + i / 100} for i, key in enumerate(keys[:10])}
    files = draw(study, Outcomes(scores, {}, [], {}, {}, {}, {}), "digits", epath.Path(tmp_path))
    text = files[1].read_text()
    for shown in (
        ">10.0<",
        ">19.0<",
        ">13.0<",
        ">18.0<",
        ">56.3<",
    ):  # 10 to 16, 17 to 19, the paper's
        assert shown in text


def test_a_study_in_a_folder_with_a_colon_is_read(tmp_path):
    folder = tmp_path / "run:1"
    folder.mkdir()
    (folder / "mine.py").write_text(TEXT)
    assert read_study(f"{folder}/mine.py").title == "Losses"
    (folder / "mine.py").write_text(TEXT.replace("get_study()", "get_study(seeds=2)"))
    assert read_study(f"{folder}/mine.py").seeds == 2


def test_a_study_that_comes_with_the_package_is_known_by_name():
    assert read_study("loss").title == read_study(str(FILES[0].with_name("loss.py"))).title
    with pytest.raises(
        UserError, match=r"no study 'losses': expected .*batch_epochs, cifar, color_strength"
    ):
        read_study("losses")


@pytest.mark.parametrize("name", OF_TWO_SCALES)
def test_the_papers_levels_have_the_papers_numbers(name):
    small, paper = read_study(name), read_study(f"{name}:paper")
    assert paper.title == small.title
    assert paper.seeds == 1
    assert set(paper.published.values) <= set(keys_of(paper))


def test_numbers_of_the_papers_figures():
    def value(name, *key):
        return read_study(f"{name}:paper").published.values[key]

    assert value("batch_epochs", "256", "100 epochs") == 57.5
    assert value("batch_epochs", "8192", "1000 epochs") == 68.9
    assert value("lr_scaling", "8192", "sqrt, 100 epochs") == 64.7
    assert value("model_size", "4", "ResNet-50") == 72.8
    assert value("head", "2048", "nonlinear", "h") == 64.8
    assert value("semi_supervised", "4", "SimCLR", "10 %") == 74.4
    assert value("semi_supervised", "1", "none", "1 %") == 25.4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "batch_epochs:large",
            r"batch_epochs\.py:large: expected no argument, or 'paper'.*'large'",
        ),
        ("loss:paper", r"loss\.py:paper: get_study takes no argument"),
    ],
)
def test_a_wrong_argument_of_a_study_is_one_line(name, says):
    with pytest.raises(UserError, match=says):
        read_study(name)


def test_claims():
    scores = {
        ("a",): {0: 0.60, 1: 0.62, 2: 0.61},
        ("b",): {0: 0.58, 1: 0.61, 2: 0.62},
        ("c",): {0: 0.30, 1: 0.31},
    }
    verdict = above("a over b", ("a",), ("b",))(scores)
    assert verdict.held
    assert "+0.7 points" in verdict.because
    assert "2 of 3 seeds up, sign test p = 1" in verdict.because
    assert not above("c over a", ("c",), ("a",))(scores).held
    assert best("b", ("b",))(scores).held  # within the spread of a
    assert not best("c", ("c",))(scores).held
    assert among_best("b", ("b",), 2)(scores).held
    assert not among_best("c", ("c",), 2)(scores).held
    assert rises("up", [("c",), ("b",), ("a",)])(scores).held
    assert not rises("down", [("a",), ("b",), ("c",)])(scores).held
    assert rises("open", [("a",), ("d",)])(scores).held is None
    lacking = {**scores, ("d",): {}}
    assert best("a", ("a",))(lacking).held is None
    assert best("a", ("a",), [("a",), ("c",)])(lacking).held
    assert among_best("a", ("a",), 2)(lacking).held is None


def test_a_sign_test_is_a_probability():
    assert sign_test([1.0, -1.0]) == 1.0
    assert sign_test([1.0, 1.0, 1.0]) == 0.25


def test_ties_hold_no_claim():
    """As many right answers in all, in other seeds: the means differ by their rounding."""
    scores = {
        ("a",): {0: 0.1, 1: 0.7, 2: 0.3},
        ("b",): {0: 0.3, 1: 0.1, 2: 0.7},
        ("c",): {0: 0.7, 1: 0.3, 2: 0.1},
        ("d",): {0: 0.0, 1: 0.0, 2: 0.0},
    }
    assert len({statistics.mean([x[s] - scores["b",][s] for s in x]) for x in scores.values()}) > 2
    for one, other in itertools.permutations((("a",), ("b",), ("c",)), 2):
        assert not above("tie", one, other)(scores).held
        assert not rises("tie", [one, other])(scores).held
        assert among_best("tie", one, 1)(scores).held


@pytest.mark.parametrize(("up", "down"), [(3, 0), (2, 1), (5, 0), (1, 6)])
def test_the_sign_test_is_scipys(up, down):
    expected = binomtest(up, up + down).pvalue
    assert sign_test([0.1] * up + [-0.2] * down + [0.0]) == pytest.approx(expected)


def test_runs_of_two_factors_are_their_product_seed_after_seed():
    a = {"x": Level({"loss.temperature": 0.1}), "y": Level({"loss.temperature": 0.5})}
    b = {"1": Level({"data.batch_size": 8}), "2": Level({"data.batch_size": 16})}
    study = Study("t", (Factor("a", a), Factor("b", b)), seeds=2)
    runs = runs_of(study)
    expected = list(itertools.product(range(2), "xy", "12"))
    assert [(run.seed, *run.key) for run in runs] == expected
    assert runs[3].overrides == {"loss.temperature": 0.5, "data.batch_size": 16, "seed": 0}
    assert not any(run.tried for run in runs)
    parts = [part_of(runs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)


def test_a_table_says_what_is_missing_and_what_has_failed(tmp_path):
    levels = {"x": Level({}), "y": Level({}), "z|": Level({})}
    study = Study("t", (Factor("a", levels),), published=Published("p", {("x",): 50.0}), seeds=2)
    for seed, accuracy in ((0, 0.5), (1, 0.6)):
        folder = tmp_path / f"x_seed-{seed}"
        folder.mkdir()
        outcome = {"about": "", "readings": {"h": {"accuracy": accuracy, "validation": 0.1}}}
        baselines = {"raw pixels": 0.6, "untrained encoder": 0.5}
        outcome |= {"baselines": baselines} if seed == 0 else {}
        (folder / OUTCOME).write_text(json.dumps(outcome))
        verdict = Verdict("collapsed" if seed else "sound", "z_std 0.1")
        (folder / HEALTH).write_text(json.dumps(verdict._asdict()))
    name = next(run.name for run in runs_of(study) if run.key == ("z|",))
    (tmp_path / name).mkdir()
    (tmp_path / name / OUTCOME).write_text(json.dumps({"about": "", "failed": "step 1: loss nan"}))
    outcomes = outcomes_of(study, epath.Path(tmp_path))
    header, lines = table_of(study, outcomes)
    assert header == ["a", "accuracy, %", "seeds", "paper, %"]
    spread = 100 * np.std([0.5, 0.6], ddof=1)
    assert lines == [
        ["x", f"55.0 ± {spread:.1f}", "2", "50.0"],
        ["y", "missing", "0", ""],
        ["z|", "failed", "0", ""],
    ]
    text = mode._markdown("t", header, lines, [], study, outcomes)
    assert "| z\\| | failed | 0 |  |" in text
    assert f"- **Failed**: {name}: step 1: loss nan" in text
    assert text.count("**Unhealthy**") == 1
    assert "- **Unhealthy**: x_seed-1: collapsed: z_std 0.1" in text
    assert "raw pixels 60.0 % (1 of 1 settings is below), untrained encoder 50.0 % (0 of 1 " in text
    # The last values of training, over both seeds that are finished; one of them stands in an earlier line alone.
    for seed in (0, 1):
        lines_of = [{"step": 1, "rank_h": 10.0}, {"step": 2, "loss": 0.5 + seed}]
        text = "".join(json.dumps(line) + "\n" for line in lines_of)
        (tmp_path / f"x_seed-{seed}" / "metrics.jsonl").write_text(text)
    watched = study._replace(metrics=("loss", "rank_h", "unknown"), seeds=3)
    failed = tmp_path / "x_seed-2"  # has no score, so its metrics do not count either
    failed.mkdir()
    (failed / OUTCOME).write_text(json.dumps({"about": "", "failed": "step 2: loss nan"}))
    (failed / "metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n')
    header, ((*_, loss, rank, unknown, _), (*_, missing, _, _, _), _) = table_of(
        watched, outcomes_of(watched, epath.Path(tmp_path))
    )
    assert header[-4:] == ["loss", "rank_h", "unknown", "paper, %"]
    assert (loss, rank, unknown, missing) == ("1", "10", "", "")
    # The metric of transfer depends on the data set.
    other = study._replace(evaluation="transfer")
    assert table_of(other, outcomes)[0][1] == "metric of B.8.1, %"


def with_outcome(folder, run, accuracy, validation):
    (folder / run.name).mkdir()
    outcome = {"readings": {"h": {"accuracy": accuracy, "validation": validation}}}
    (folder / run.name / OUTCOME).write_text(json.dumps(outcome))


@pytest.mark.parametrize("labels", [None, 5])
def test_a_run_of_a_study_fits_no_probe_that_is_not_read(labels, tiny):
    study = Study("t", (Factor("a", {"x": Level({})}),), labels_per_class=labels)
    config = config_of(tiny, study, runs_of(study)[0])
    assert config.eval.labels_per_class == (() if labels is None else (labels,))
    assert config.eval.label_fraction == 0
    # A study of an earlier version, which fitted them, goes on.
    tiny.eval.labels_per_class, tiny.eval.label_fraction = (1, 10), 0.01
    before, now = (about_run(c, study, "d")["options"] for c in (tiny, config))
    names = ("eval.labels_per_class", "eval.label_fraction")
    assert [before[name] for name in names] == [now[name] for name in names]


def test_a_table_names_the_settings_that_were_chosen(tmp_path):
    settings = tuple({"loss.temperature": tau} for tau in (0.2, 0.5))
    levels = {
        "x": Level({}, settings),
        "y": Level({"data.batch_size": 8}),
        "z": Level({}, settings),
    }
    study = Study("t", (Factor("a", levels),), seeds=1)
    for run in runs_of(study):
        if run.key != ("z",):
            with_outcome(tmp_path, run, 0.5 - 0.1 * run.setting, 0.1 + 0.1 * run.setting)
    header, lines = table_of(study, outcomes_of(study, epath.Path(tmp_path)))
    assert header == ["a", "accuracy, %", "seeds", "chosen"]
    assert lines == [
        ["x", "40.0", "1", "loss.temperature=0.5"],
        ["y", "50.0", "1", ""],
        ["z", "missing", "0", ""],
    ]


def test_keys_that_claims_name_get_the_further_seeds_too(tmp_path):
    levels = {name: Level({}) for name in "uvwxyz"}
    study = Study("t", (Factor("a", levels),), seeds=2, extremes=1, always=(("w",), ("u",)))
    first = [run for run in runs_of(study) if run.seed == 0]
    for place, run in enumerate(first):
        with_outcome(tmp_path, run, 0.1 * place, 0.1)
    wanted = [run for run in runs_wanted(study, epath.Path(tmp_path)) if run.seed == 1]
    assert [run.key for run in wanted] == [("u",), ("w",), ("z",)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(): pass", "defines no get_study: expected a file that does"),
        ("def get_study(): return 1", "get_study returned 1: expected a Study"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        (TEXT.replace("loss.margin", "loss.margins"), "options that do not exist: loss.margins"),
        (
            TEXT.replace("seeds=2", "evaluation='knn'"),
            "knn has no validation accuracy to choose by",
        ),
        (
            TEXT.replace("seeds=2", "evaluation='kmeans'"),
            "evaluation='kmeans': expected one of probe",
        ),
        (
            TEXT.replace("seeds=2", "evaluation='knn', labels_per_class=1"),
            "knn has no such row: expected labels_per_class=None",
        ),
        (
            NAMED.replace('{"1 %": {}}', '{"1 %": {"eval.knn_k": 3}}'),
            "readings of finetune are its own: expected no overrides",
        ),
        (TEXT.replace('"margin": L', '"tau-0.5": L'), "levels need names that differ"),
        (TEXT.replace("seeds=2", "seeds=0"), "1 readings, 0 seeds: expected one or more of both"),
        (TEXT.replace("seeds=2", "matrix=True"), "a matrix of 1 factors and 1 readings"),
        (TEXT.replace("levels),)", "levels, numbers=True),)"), "levels that are not numbers above"),
    ],
)
def test_a_bad_study_is_one_line(tmp_path, text, says):
    path = tmp_path / "s.py"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_study(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b"])
def test_a_bad_part_is_one_line(part):
    with pytest.raises(UserError, match=f"--part={part}: expected I/N"):
        part_of([], part)


def test_a_study_needs_labels(short, file, tmp_path):
    with np.load(short.data.path) as arrays:
        np.savez(tmp_path / "x.npz", train_images=arrays["train_images"])
    short.data.path = str(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"the data have no labels.*see data\.folder_labels"):
        run_study(short, str(tmp_path / "S"), file)
    with pytest.raises(UserError, match=r"no study '/nowhere\.py'"):
        run_study(short, str(tmp_path / "S"), "/nowhere.py")


def run_named(c, folder, text, readings, evaluation):
    """The accuracies {reading: accuracy} of a study of one run."""
    text = text.replace('{"1 %": {}}', repr({name: {} for name in readings}))
    file = folder / "named.py"
    file.write_text(text.replace("finetune", evaluation))
    result = run_study(c, str(folder / "S"), str(file))
    return {row["key"][-1]: row["accuracies"][0] for row in result["rows"]}


@pytest.mark.whole
def test_a_study_reads_shares_of_labels_of_a_fine_tuning(short, tmp_path):
    options = {
        "finetune.label_fractions": (0.5, 1.0),
        "finetune.epochs": (1.0, 1.0),
        "finetune.batch_size": 16,
        "eval.seeds": 1,
    }
    config.set_options(short, options)
    found = run_named(short, tmp_path, NAMED, ["50 %", "100 %"], "finetune")
    result = json.loads((tmp_path / "S/x_seed-0/finetune.json").read_text())
    assert {row["features"] for row in result["rows"]} == {"encoder"}
    assert found == {"50 %": result["rows"][0]["accuracy"], "100 %": result["rows"][1]["accuracy"]}
    with pytest.raises(UserError, match="the study reads 1 %, and finetune has 50 %, 100 % here"):
        run_named(short, tmp_path, NAMED, ["1 %"], "finetune")


@pytest.mark.whole
def test_a_study_reads_what_is_known_of_transformations(short, tmp_path):
    names = [f"{task}, {kind}" for task in TASKS for kind in ("h", "z")]
    found = run_named(short, tmp_path, NAMED, names, "transformations")
    assert found.keys() == set(names)
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert (tmp_path / "S/figure.png").exists()


def test_an_image_is_asked_about_whatever_the_batches_are():
    images = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3)).astype(np.uint8)
    labels = np.where(np.arange(400) == 7, BROKEN, 0)

    def all_of(name, size, share=Share()):
        own = {
            "image": images[share.index :: share.count],
            "label": labels[share.index :: share.count],
        }
        batches = (
            {key: x[i : i + size] for key, x in own.items()}
            for i in range(0, len(own["label"]), size)
        )
        found = list(transformations.asked(TASKS[name], batches, share, seed=3, part=1))
        return [np.concatenate([batch[key] for batch in found]) for key in ("image", "label")]

    for name, task in TASKS.items():
        changed, answers = all_of(name, 64)
        again, same = all_of(name, 50)
        np.testing.assert_array_equal(changed, again)
        np.testing.assert_array_equal(answers, same)
        of_one, its_answers = all_of(name, 50, Share(1, 4))
        np.testing.assert_array_equal(of_one, changed[1::4])
        np.testing.assert_array_equal(its_answers, answers[1::4])
        assert answers[7] == BROKEN
        share = np.bincount(np.delete(answers, 7)) / 399
        np.testing.assert_allclose(share, task.shares, atol=0.08)
        kept = np.flatnonzero(answers == 0)
        np.testing.assert_array_equal(changed[kept], images[kept])
        for i in np.flatnonzero(answers > 0)[:20]:
            x = images[i].astype(np.float64)
            if name == "rotation":
                turned = x
                for _ in range(answers[i]):  # counter-clockwise
                    turned = np.stack([[turned[r][-1 - c] for r in range(8)] for c in range(8)])
                np.testing.assert_array_equal(changed[i], turned)
            elif name == "colour or grey":
                grey = x @ [0.2989, 0.5870, 0.1140]
                assert np.abs(changed[i] - grey[..., None]).max() < 0.51
            else:
                assert np.abs(changed[i] - x).max() > 5


def test_what_a_probe_is_told_it_finds():
    """Features that hold the answer, and features that do not."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, 600)
    telling = rng.normal(size=(600, 8)) + 3.0 * answers[:, None]
    silent = rng.normal(size=(600, 8))

    def score(features):
        half = slice(0, 400), slice(400, 600)
        x, y = ([values[part] for part in half] for values in (features, answers))
        return transformations.probe(x[0], y[0], x[1], y[1], seed=0)

    assert score(telling) > 0.95
    with pytest.raises(UserError, match="no probe can be fitted to the features of 4 images"):
        transformations.probe(telling[:4], answers[:4], telling, answers, seed=0)
    assert score(silent) < 0.65


def test_the_legend_is_inside_the_figure(tmp_path):
    study = read_study("model_size")
    scores = {key: {0: 0.5 + i / 100} for i, key in enumerate(keys_of(study))}
    png, _ = draw(study, Outcomes(scores, {}, [], {}, {}, {}, {}), "emoji", epath.Path(tmp_path))
    legend = np.asarray(Image.open(png).convert("L"))[-80:]
    assert legend.min() < 100
    assert legend[:, :4].min() == legend[:, -4:].min() == 255


def test_readings_of_one_level_are_drawn_side_by_side(tmp_path):
    study = read_study("head_knows")
    scores = {key: {0: 0.5 + i / 100} for i, key in enumerate(keys_of(study))}
    text = draw(study, Outcomes(scores, {}, [], {}, {}, {}, {}), "digits", epath.Path(tmp_path))[
        1
    ].read_text()
    for shown in (">rotation<", ">original or Sobel<", ">h<", ">z<"):
        assert shown in text
    assert ">rotation, h<" not in text


def test_other_data_are_transferred_to_where_they_are_prepared(monkeypatch):
    monkeypatch.setattr("simclr_jax.data.tfds.is_prepared", lambda name: name in ("dtd", "cifar10"))
    study = read_study("transfer")
    assert list(study.readings) == ["CIFAR-10", "DTD"]
    monkeypatch.setattr("simclr_jax.data.tfds.is_prepared", lambda name: False)
    with pytest.raises(UserError, match="none of the data sets of the study transfer is prepared"):
        read_study("transfer")


def test_claims_at_their_edges():
    """The larger of two deviations is the spread; the first point is held against the last, not the one before."""
    a = {0: 0.60, 1: 0.61, 2: 0.62}
    behind = {seed: x - 0.015 for seed, x in a.items()}
    assert not best("", ("b",))({("a",): a, ("b",): behind}).held
    steady, wide = {0: 0.61, 1: 0.61, 2: 0.61}, {0: 0.58, 1: 0.60, 2: 0.62}
    assert best("", ("b",))({("a",): steady, ("b",): wide}).held
    assert best("", ("b",))({("a",): wide, ("b",): dict.fromkeys(a, 0.59)}).held
    low = dict.fromkeys(a, 0.3)
    assert rises("", [("l",), ("a",), ("b",)])({("l",): low, ("a",): a, ("b",): behind}).held


def test_the_best_of_some_is_not_held_against_the_rest():
    scores = {("a",): {0: 0.9}, ("b",): {0: 0.5}, ("c",): {0: 0.1}}
    assert best("", ("b",), [("b",), ("c",)])(scores).held


def test_the_noise_of_a_task_is_the_papers_and_each_part_has_its_own():
    """Table 3: standard deviation 0.1."""
    grey = {"image": np.full((200, 8, 8, 3), 128, np.uint8), "label": np.zeros(200, int)}
    made = [
        next(transformations.asked(TASKS["original or noisy"], iter([grey]), Share(), 3, part))
        for part in (0, 1)
    ]
    assert not np.array_equal(made[0]["label"], made[1]["label"])
    noisy = made[0]["image"][made[0]["label"] == 1] / 255
    assert noisy.std() == pytest.approx(0.1, rel=0.05)
