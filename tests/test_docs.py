"""The programs in docs/design.md, as a reader would add them."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from test_loop import config_file

from simclr_jax.config.overrides import load
from simclr_jax.errors import UserError
from simclr_jax.losses import LOSSES
from simclr_jax.losses.checks import TAKEN
from simclr_jax.main import main
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.views import make_distortion

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "design.md"


def text_with(word: str) -> str:
    """The one program of the page that has the word."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (text,) = [text for text in programs if word in text]
    return text


def program(text: str) -> dict:
    """Runs a program; returns what it defines."""
    defined: dict = {"__name__": "added"}
    exec(compile(text, str(PAGE), "exec"), defined)
    return defined


def test_every_module_is_in_a_package_that_is_installed():
    """An editable install imports a folder without __init__.py too; a wheel does not have it."""
    files = (pathlib.Path(__file__).parent.parent / "simclr_jax").rglob("*.py")
    assert [f.parent for f in files if not f.with_name("__init__.py").exists()] == []


def test_the_loss_is_that_of_a_loop_and_trains(tiny, tmp_path, monkeypatch):
    text = text_with("uniformity")
    build = program(text)["build"]
    loss = build({}, None, 3)
    z = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    unit = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float64)
    alignment = np.mean([np.sum((unit[2 * i] - unit[2 * i + 1]) ** 2) for i in range(3)])
    potentials = [
        np.exp(-2 * np.sum((unit[i] - unit[j]) ** 2)) for i in range(6) for j in range(6) if i != j
    ]
    value, metrics = jax.jit(loss.apply)(jnp.asarray(z), jnp.full(3, -1))
    found = float(metrics["batch_uniformity"])
    assert found == pytest.approx(np.log(np.mean(potentials)), rel=1e-5)
    assert float(value) == pytest.approx(alignment + np.log(np.mean(potentials)), rel=1e-5)

    tiny.train.steps, tiny.train.log_every_steps = 2, 1
    options = ["--config.loss.name=uniformity"]
    with pytest.raises(UserError, match=r"loss\.name='uniformity': expected one of nt_xent, dcl"):
        load(str(config_file(tiny, tmp_path)), options)
    own = config_file(tiny, tmp_path)
    row = "\nfrom simclr_jax.losses import LOSSES\n\nLOSSES['uniformity'] = build\n"
    own.write_text(text + row + own.read_text())
    monkeypatch.setitem(LOSSES, "uniformity", None)  # taken away again after the test
    pretrain(load(str(own), options), str(tmp_path / "w"))
    lines = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    reported = set(json.loads(lines[0]))
    assert {"loss", "alignment", "batch_uniformity"} <= reported
    assert reported - {"batch_uniformity"} <= set(TAKEN)  # which a loss may not report
    # Later commands do not need the loss, but to train on does.
    monkeypatch.delitem(LOSSES, "uniformity")
    main([f"--workdir={tmp_path / 'w'}", "--mode=knn"])
    assert (tmp_path / "w" / "knn.json").exists()
    with pytest.raises(UserError, match=r"'uniformity': expected .* or one that the file given as"):
        main([f"--workdir={tmp_path / 'w'}"])


def test_the_distortion_is_the_same_on_host_and_device():
    posterize = program(text_with("Posterize"))["Posterize"]
    options = {"posterize_probability": 0.5, "posterize_levels": 5.0}
    distortion = make_distortion(options, operations=(posterize,))
    (operation,) = distortion.operations
    assert operation.is_on
    x = np.random.default_rng(0).uniform(size=(3, 8, 8)).astype(np.float32)
    few = np.round(4 * x.astype(np.float64)) / 4
    for number, expected in ((0.4, few), (0.6, x)):
        host = operation.host(tf.constant(x), {"posterize": tf.constant([number])})
        drawn = {"posterize": jnp.full((1, 1, 1), number)}
        device = operation.device(tuple(jnp.asarray(x)), drawn)
        np.testing.assert_allclose(host, expected, atol=1e-6)
        np.testing.assert_allclose(np.stack(device), expected, atol=1e-6)
