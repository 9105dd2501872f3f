"""Where the time of a training goes, on a clock that the tests turn."""

import itertools
import types

import pytest

from simclr_jax.console import Progress
from simclr_jax.training import clock as clock_module
from simclr_jax.training.clock import Clock
from simclr_jax.training.log import Log, Reporting


@pytest.fixture
def turn(monkeypatch):
    """A function that lets seconds pass."""
    now = [1000.0]
    stopped = types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(clock_module, "time", stopped)

    def turn(seconds):
        now[0] += seconds

    return turn


def test_an_evaluation_is_not_counted_in_images_a_second(turn):
    """Nor are steps that are waited for at once, which may have ended together."""
    written = []
    writer = types.SimpleNamespace(write=lambda step, values: written.append(values))
    log = Log("", writer, Progress(8), Reporting(4, 8), [], Clock())
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
    for step in range(1, 9):
        turn(2.0)
        log.add(step, metrics, {})
        if step == 4:
            log.drain()
            turn(50.0)
            log.write(4, {"knn_accuracy": 0.5})
    log.drain()
    assert len(written) == 3
    assert written[0]["images_per_second"] == written[-1]["images_per_second"] == 8 / 2.0


def test_a_training_of_two_steps_has_no_speed(turn):
    """The first compiles, and when it is read the second may be over."""
    written = []
    writer = types.SimpleNamespace(write=lambda step, values: written.append(values))
    log = Log("", writer, Progress(2), Reporting(2, 8), [], Clock())
    for step in (1, 2):
        log.add(step, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}, {})
    turn(1e-3)
    log.drain()
    assert "images_per_second" not in written[0]


def test_images_a_second_leave_out_compiling_and_pauses(turn):
    clock = Clock()
    turn(100.0)  # compiles
    clock.step()
    turn(2.0)
    clock.step()
    turn(50.0)  # an evaluation
    clock.pause()
    for _ in range(2):
        turn(2.0)
        clock.step()
    assert clock.report(8)["images_per_second"] == pytest.approx(8 / 2.0)
    turn(4.0)
    clock.step()
    assert clock.report(8)["images_per_second"] == pytest.approx(8 / 4.0)  # since the last report


def test_goodput_counts_kept_steps_over_restarts(turn):
    clock = Clock()
    turn(10.0)  # compiles
    clock.step()
    for _ in range(5):
        turn(2.0)
        clock.step()
    with clock.spending("saving"):
        turn(1.0)
    assert clock.report(8)["goodput"] == pytest.approx(10 / 21)
    kept = clock.memory
    turn(2.0)
    clock.step()  # is lost
    turn(77.0)  # before it is started again
    clock = Clock(kept)
    turn(10.0)
    clock.step()
    for _ in range(5):
        turn(2.0)
        clock.step()
    assert clock.report(8)["goodput"] == pytest.approx((10 + 10) / (21 + 2 + 77 + 20))


def test_what_a_save_takes_is_no_training(turn):
    clock = Clock()
    clock.step()
    with clock.spending("saving"):
        turn(6.0)
    turn(2.0)
    clock.step()
    found = clock.report(8)
    assert found["goodput"] == pytest.approx(2 / 8)
    assert found["share_of_time_saving"] == pytest.approx(6 / 8)


def test_the_process_that_is_least_in_the_step_is_the_slowest(turn):
    of_others = itertools.cycle([0.25])
    clock = Clock(gather=lambda mine: [next(of_others), mine, next(of_others)])
    turn(9.0)
    with clock.computing():
        turn(1.0)
    found = clock.report(8)
    assert found["slowest_process"] == 1
    assert found["slowest_process_share"] == pytest.approx(0.9)
    with clock.computing():
        turn(10.0)
    assert clock.report(8)["slowest_process"] == 0
    assert "slowest_process" not in Clock().report(8)  # alone


def test_what_saving_costs_is_said_once_where_it_is_much(turn):
    def lines(step_seconds):
        clock, found = Clock(), []
        for _ in range(8):
            turn(step_seconds)
            clock.step()
            with clock.spending("saving"):
                turn(0.5)
            found.append(clock.costly_saving())
        return [line for line in found if line]

    (line,) = lines(1.0)
    assert line.startswith(
        "saving      takes 38 % of the time, 0.5 s each"
    )  # 5 x 0.5 of 4 + 5 x 0.5
    assert lines(10.0) == []
