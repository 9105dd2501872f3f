"""The benchmark command: what it reports is what it did, and it is refused what it cannot do."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from simclr_jax import assemble
from simclr_jax.bench import __main__ as bench
from simclr_jax.bench import chips, loss
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def measured(tiny, tmp_path):
    """(what, more arguments) to the JSON that the command writes for the tiny configuration."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from simclr_jax.config import from_dict\n"
        f"def get_config(_): return from_dict({tiny.to_dict()!r})\n"
    )

    def run(what, *more):
        output = tmp_path / f"{what}.json"
        bench.main([what, f"--config={path}", "--seconds=0.5", f"--output={output}", *more])
        return json.loads(output.read_text())

    return run


@pytest.mark.parametrize("placement", [pytest.param("host", marks=pytest.mark.slow), "device"])
@pytest.mark.whole
def test_a_step_is_measured_beside_a_supervised_one(measured, placement, capsys):
    result = measured("step", f"--config.data.placement={placement}")
    simclr, supervised = result["rows"]
    for row in (simclr, supervised):
        assert row["steps"] > 0
        assert row["views_per_second_per_device"] * jax.device_count() == pytest.approx(
            row["views_per_second"]
        )
        assert row["flops_per_second_per_device"] is None  # on a CPU
        assert row["peak_memory_bytes"] > 0
    assert simclr["views_per_second"] == pytest.approx(2 * simclr["images_per_second"])
    assert simclr["share_of_supervised"] == pytest.approx(
        simclr["views_per_second"] / supervised["views_per_second"]
    )
    assert result["versions"]["jax"] == jax.__version__
    assert "of supervised" in capsys.readouterr().out


@pytest.mark.whole
def test_of_loops_no_flops_are_said(measured, monkeypatch):
    """Of microbatches; on a CPU of convolutions too."""
    more = "--config.data.placement=device", "--config.train.microbatches=2"
    rows = measured("step", *more)["rows"]
    assert [row["flops_per_second_per_device"] for row in rows] == [None, None]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    simclr, supervised = measured("step", *more)["rows"]
    assert simclr["flops_per_second_per_device"] is None
    assert supervised["flops_per_second_per_device"] > 0


@pytest.mark.whole
def test_input_and_a_whole_run_are_measured(measured, monkeypatch):
    monkeypatch.setattr(assemble, "make_mesh", lambda **_: make_mesh(jax.devices()[:1]))
    (row,) = measured("input", "--config.data.placement=host")["rows"]
    assert row["views_per_second"] == pytest.approx(2 * row["images_per_second"])
    (row,) = measured("e2e")["rows"]
    assert 0 < row["share_waiting_for_input"] < 1
    assert row["steps"] > 0


def test_losses_are_measured_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "_LOSS_PAIRS", (16, 32))
    bench.main(["loss", "--seconds=0.1", f"--output={tmp_path / 'loss.json'}"])
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert {(row["of"], row["pairs"]) for row in rows} == {
        (f"NT-Xent, {name}", pairs) for name in ("dense", "chunked") for pairs in (16, 32)
    }


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="needs a --config"):
        bench.main(["step"])
    with pytest.raises(UserError, match="the host makes no views"):
        bench.main(["input", "--config=digits", "--config.data.placement=device"])
    with pytest.raises(UserError, match="--seconds=0: expected a number above 0"):
        bench.main(["loss", "--seconds=0"])
    with pytest.raises(UserError, match="takes no configuration"):
        bench.main(["loss", "--config.seed=1"])
    with pytest.raises(UserError, match=r"unknown argument '--second=1'.*near names: --seconds"):
        bench.main(["step", "--config=configs/digits.py", "--second=1"])
    with pytest.raises(UserError, match=r"invalid choice: 'stp'.*--help names all flags"):
        bench.main(["stp"])


def benchmark(name):
    """Imports a file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_about_speed_has_the_table_of_the_newest_results():
    """Made by `python benchmarks/table.py`."""
    assert "\n".join(benchmark("table").lines()) in (ROOT / "docs/performance.md").read_text()


def test_the_benchmark_of_learning_numbers_the_classes_of_both_folders_alike(tmp_path):
    for place, value in (
        ("train/a", 0),
        ("train/b", 1),
        ("train/c", 2),
        ("test/b", 1),
        ("test/c", 2),
    ):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / place / "x.png")
    for part in benchmark("learning").load(tmp_path).values():
        assert [image[0, 0, 0] for image in part.images] == part.labels.tolist()


def test_the_peak_of_a_chip_is_that_of_the_first_name_that_fits():
    """A v5e calls itself "TPU v5 lite", a v5p "TPU v5"."""
    for kind in chips.PEAKS:
        assert next(name for name in chips.PEAKS if kind.startswith(name)) == kind
