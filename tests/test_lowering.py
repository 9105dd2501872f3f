"""What the compiler makes of the step for TPU slices that are not there (needs the `tpu` extra)."""

import functools
import importlib.util
import json
import math
import os
import re
import resource

import jax
import jax.numpy as jnp
import pytest

from simclr_jax import assemble, config, main
from simclr_jax.config.python_files import read_file
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh
from simclr_jax.modes import compile as compiling
from simclr_jax.modes.collectives import between_slices, collectives
from simclr_jax.views import placement

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install -e '.[tpu]'",
)

TOPOLOGY = "v5e:2x2"
BATCH = 72  # 18 images a chip; 2B = 144 is no other size in the program


@pytest.fixture
def small():
    return small_config()


def small_config():
    """A small model in bfloat16 on images of 32 px."""
    c = config.default()
    c.data.name = "digits"
    c.data.image_size = 32
    c.data.batch_size = BATCH
    c.model.depth = 10
    c.model.width = 0.25
    c.model.stem = "strided"
    c.model.dtype = "bfloat16"
    return c


@pytest.fixture(autouse=True)
def the_cache_of_the_other_tests():
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@functools.cache
def compiled_as(options):
    """The small model with these options, (name, value) each, compiled once for all tests."""
    config = small_config()
    config.update_from_flattened_dict(dict(options))
    return compiled(config)


def compiled(config):
    _, devices = compiling.slice_of(TOPOLOGY)
    mesh = make_mesh(devices, config.mesh.fsdp)
    program = compiling.compile_step(config, mesh, TOPOLOGY)
    return program, collectives(program.as_text(), mesh.size)


def stack_views(monkeypatch):
    """Puts the first views of all images before the second ones, as the reshape in the step avoids."""
    original = placement.to_float

    def stacked(x):
        x = original(x)
        return jnp.concatenate([x[0::2], x[1::2]])

    monkeypatch.setattr(placement, "to_float", stacked)


def kernels_of(program):
    """The parameters with two and more axes that a compiled step takes."""
    state = program.args_info[0][0]
    return [x for x in jax.tree.leaves(state.params) if len(x.shape) > 1]


def all_reduced(program):
    """The shapes that each all-reduce of arrays of two and more axes sums: gradients, not the
    vectors of BatchNorm.
    """
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program.as_text())
    return [shapes for shapes in found if re.search(r"\[\d+,\d+", shapes)]


@pytest.mark.slow
@needs_libtpu
def test_the_dense_step_gathers_the_projections_once_and_moves_nothing_else(small):
    program, found = compiled_as(())
    assert found.keys() == {"all-gather", "all-reduce"}  # no all-to-all, no collective-permute
    assert found["all-gather"]["count"] == 1
    assert found["all-gather"]["bytes"] == 2 * BATCH * small.model.head_width * 4
    text = program.as_text()
    assert f"f32[{2 * BATCH // 4},{2 * BATCH}]" in text  # a chip's share of the similarities
    assert f"[{2 * BATCH},{2 * BATCH}]" not in text
    # The gradients of 14 kernels and the classifier in two sums, that of the projections in one.
    assert len(all_reduced(program)) <= 3


def on_eight_cpus(config):
    """The collectives of the step on 8 CPU devices, for which no TPU's compiler is needed."""
    config.model.dtype = "float32"
    config.model.width = 0.125
    program = compiling.compile_step(config, make_mesh(), "")
    return collectives(program.as_text(), 8)


def test_a_tiny_step_has_no_more_collectives_than_it_had(small):
    found = on_eight_cpus(small)
    assert found.keys() == {"all-gather", "all-reduce"}
    assert found["all-gather"]["count"] == 1
    assert found["all-gather"]["bytes"] == 2 * BATCH * small.model.head_width * 4
    # 13 BatchNorms, of which 12 in float32 need three sums, one after the other: mean, variance, backward.
    assert found["all-reduce"]["count"] <= 40


def test_a_tiny_step_that_stacks_view_on_view_is_told_by_its_collectives(small, monkeypatch):
    stack_views(monkeypatch)
    small.data.batch_size = 80  # JAX would take the step that it traced before
    assert {"all-to-all", "collective-permute"} & on_eight_cpus(small).keys()


@pytest.mark.slow
@needs_libtpu
def test_the_step_in_tiles_gathers_projections_and_normalisers(small):
    small.loss.implementation = "chunked"
    program, found = compiled(small)
    assert found.keys() == {"all-gather", "all-reduce"}
    # The normalisers, one number an anchor, may become an all-reduce.
    assert found["all-gather"]["count"] <= 2
    assert found["all-gather"]["bytes"] <= 2 * BATCH * (small.model.head_width + 1) * 4
    assert f"[{2 * BATCH},{2 * BATCH}]" not in program.as_text()


@pytest.mark.slow
@needs_libtpu
def test_sharded_parameters_are_gathered_and_need_less_memory(small):
    whole, _ = compiled_as(())
    small.mesh.fsdp = 4
    program, found = compiled(small)
    # Kernels are gathered, one by one, in bfloat16: 2 bytes a number, of the head and the rest no more than 4.
    assert found.keys() == {"all-gather", "all-reduce"}
    assert found["all-gather"]["count"] > 10
    projections = 2 * BATCH * small.model.head_width * 4
    kernels = sum(math.prod(x.shape) for x in kernels_of(program))
    assert 2 * kernels <= found["all-gather"]["bytes"] - projections < 3 * kernels
    ratio = (
        program.memory_analysis().argument_size_in_bytes
        / whole.memory_analysis().argument_size_in_bytes
    )
    assert ratio < 0.7  # of the images, which are the same, and a quarter of the parameters


@pytest.mark.slow
@needs_libtpu
def test_microbatches_are_found_on_their_own_devices(small):
    small.train.microbatches = 2
    small.data.batch_size = 80  # 20 a chip
    _, found = compiled(small)
    assert not {"all-to-all", "collective-permute"} & found.keys()
    # Projections once; their gradient may come back by a second gather. Never images.
    assert found["all-gather"]["bytes"] <= 4 * 160 * small.model.head_width * 4


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_stacks_view_on_view_is_told_by_its_collectives(small, monkeypatch):
    stack_views(monkeypatch)
    _, found = compiled(small)
    assert {"all-to-all", "collective-permute"} & found.keys()


@pytest.mark.slow
@needs_libtpu
def test_the_report_is_a_table_and_json(small, tmp_path, capsys, monkeypatch):
    program, _ = compiled_as(())
    monkeypatch.setattr(compiling, "compile_step", lambda *_: program)
    result = compiling.compile_for(small, str(tmp_path / "w"), TOPOLOGY)
    said = capsys.readouterr().out
    assert "compiled for 4 devices of v5e:2x2 (TPU v5 lite)" in said
    assert "(bound, not measured)" in said
    assert json.loads(said.splitlines()[-1]) == result
    assert json.loads((tmp_path / "w/compile.json").read_text()) == result
    assert result["memory_total"] == sum(result["memory"].values()) < result["memory_limit"]
    assert result["views_per_second_bound"] == pytest.approx(
        2 * BATCH / max(result["bounds"].values())
    )
    # 2 x 2 x (2 multiplications and additions of the forward pass), thrice with the backward
    # pass, of some 6.5 M multiplications a view at 32 px.
    assert 2e7 < result["flops_per_view"] < 8e7


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        ("v3:4x4", 32),
        ("v4:2x2x4", 16),
        ("2xv5e:2x2", 8),
        ("v5e:16x16", 256),
        ("v5p:2x2x2", 8),
        ("v6e:2x4", 8),
    ],
)
def test_slices_have_the_devices_that_jax_sees_there(topology, devices):
    assert len(compiling.slice_of(topology)[1]) == devices


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--topology=v9:2x2",), "of a kind out of v3, v4, v5e, v5p, v6e"),
        (("--topology=v5e",), "expected KIND:SHAPE"),
        (("--topology=0xv5e:2x2",), "or several slices such as 2xv5e:4x4"),
        (("--topology=2xv5e:2x2", "--config.mesh.fsdp=8"), "does not divide 4 devices of a slice"),
        (("--topology=v5e:3x5",), "not divisible"),
        (("--topology=v5e:4x4", "--config.mesh.fsdp=3"), "mesh.fsdp=3 does not divide 16 devices"),
        (("--topology=v5e:4x4", "--config.data.batch_size=100"), "does not divide over 16 devices"),
        (("--topology=v6e:8x8",), "run `ulimit -s unlimited` first"),
        ((), "needs --topology"),
    ],
)
@needs_libtpu
def test_mistakes_with_slices(arguments, says, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**23, 2**23))
    with pytest.raises(UserError, match=says):
        main.main(["--mode=compile", "--config=configs/imagenet.py", *arguments])


def test_other_modes_need_a_workdir():
    with pytest.raises(UserError, match="no --workdir"):
        main.main(["--config=configs/digits.py"])


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.58G of 15.75G hbm. ...",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.58G) exceeds available HBM (15.75G).",
    ],
)
def test_a_step_that_does_not_fit_is_said_with_by_how_much_and_what_to_try(message):
    said = str(compiling.too_large("v5e:4x4", message))
    assert "it needs 20.58 GiB of 15.75 GiB, 4.83 GiB too much: try" in said
    assert "model.remat=True" in said
    assert "\n" not in said


PROGRAM = """
  %all-reduce.1 = (f32[16]{0:T(128)}, bf16[3,3,8,8]{3,2,1,0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-gather.9 = f32[128,128]{1,0:T(8,128)} all-gather(%p), channel_id=2, replica_groups=[2,2]<=[4], dimensions={0}
  %all-gather.11 = f32[128,128]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=2, replica_groups=[2,2]<=[4], dimensions={0}
  %ags = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%q), channel_id=3, replica_groups=[2,2]<=[4], dimensions={0}
  %cps = (bf16[3,4]{1,0}, bf16[3,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%r), channel_id=4, source_target_pairs={{0,1}}
  %fusion.1 = f32[8]{0} fusion(%all-reduce.1), kind=kLoop
"""


def test_collectives_are_counted_by_channel_and_weighed():
    found = collectives(PROGRAM, 4)
    reduced, gathered = 16 * 4 + 9 * 64 * 2, 128 * 128 * 4 + 4 * 8 * 4
    assert found == {
        "all-gather": {"count": 2, "bytes": gathered, "sent": gathered / 2},
        "all-reduce": {"count": 1, "bytes": reduced, "sent": reduced * 1.5},
        "collective-permute": {"count": 1, "bytes": 24, "sent": 24},
    }


ACROSS = """
  %send = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%b, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send.2 = (bf16[16,128]{1,0}, u32[]{:S(2)}, token[]) send(%c, %t), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-gather.2_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %send.3 = (f32[16]{0}, u32[]{:S(2)}, token[]) send(%d, %t), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="collective-permute.2_0",_xla_megascale_transfer_type="ONE_TO_ONE"}
"""


def test_what_goes_from_slice_to_slice_is_counted():
    reduced, gathered = 64 * 8 * 128 * 4, 16 * 128 * 2
    assert between_slices(ACROSS, 4) == {
        "all-gather": {"count": 1, "bytes": gathered, "sent": gathered * 3},
        "all-reduce": {"count": 1, "bytes": reduced, "sent": reduced * 6 / 4},
        "one-to-one": {"count": 1, "bytes": 64, "sent": 64},
    }
    assert between_slices(PROGRAM, 1) == {}


@pytest.mark.slow
@needs_libtpu
def test_between_two_slices_each_device_hands_over_its_part_of_what_is_reduced(small):
    topology = f"2x{TOPOLOGY}"
    small.model.dtype = "float32"
    result = compiling.compile_for(small, None, topology)
    assert result["devices"] == 8
    found = result["between_slices"]
    assert found.keys() == {"all-gather", "all-reduce"}
    # The projections of the other slice, once, a quarter by each of its chips.
    assert found["all-gather"]["count"] == 1
    # Gradients are first reduced within the slice: a chip hands a quarter of them over, and BatchNorm's sums.
    job = assemble.pretraining_job(small, assemble.plan_of(small, 1000), 1000, make_mesh())
    sizes = [x.size for x in jax.tree.leaves(job.abstract_state.params)]
    assert sum(sizes) <= found["all-reduce"]["bytes"] < 2 * sum(sizes)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "batch"), [("v5e:4x4", 1024), ("v3:4x4", 4096)])
def test_resnet_50_fits(topology, batch):
    """The paper's batch of 4096 on the 32 cores it ran on, and 64 images a chip of a small slice."""
    c = read_file("configs/imagenet.py")
    c.data.batch_size = batch
    result = compiling.compile_for(c, None, topology)
    assert result["memory_total"] < result["memory_limit"]
    assert result["collectives"].keys() == {"all-gather", "all-reduce"}
    assert result["collectives"]["all-gather"]["count"] == 1
    assert result["collectives"]["all-reduce"]["count"] < 110  # two a BatchNorm, and the gradients


@needs_libtpu
@pytest.mark.slow
def test_resnet_50_with_too_many_images_is_refused():
    c = read_file("configs/imagenet.py")
    c.data.batch_size = 8192
    with pytest.raises(UserError, match=r"GiB of 15\.75 GiB, .* GiB too much"):
        compiling.compile_for(c, None, "v5e:4x4")


def test_the_programs_of_these_tests_are_for_no_device_of_this_machine():
    assert jax.default_backend() == "cpu"
    assert os.environ["JAX_PLATFORMS"] == "cpu"
