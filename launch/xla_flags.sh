# shellcheck shell=bash
# The compiler's flags that let communication overlap with computation; the only place for them.
#
#     source launch/xla_flags.sh tpu|gpu
#
# What the user has set in the environment comes last, so it wins.

case ${1:-} in
  tpu)
    # Fuses all-gathers with the computation around them and runs both at once:
    # AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER.
    flags="--xla_tpu_enable_async_collective_fusion=true"
    flags+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
    flags+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
    flags+=" --xla_tpu_overlap_compute_collective_tc=true"
    flags+=" --xla_enable_async_all_gather=true"
    # Overlaps the all-reduces of the gradients, which are of many sizes, with the backward pass:
    # the same file, DATA_PARALLEL_OVERLAP.
    flags+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    flags+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
    export LIBTPU_INIT_ARGS="$flags ${LIBTPU_INIT_ARGS:-}"
    ;;
  gpu)
    # Schedules collectives early and their results late: docs.jax.dev, "GPU performance tips",
    # and the flag that NVIDIA's JAX images set (docs.nvidia.com/jax-toolbox, "Environment
    # Variables").
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
    ;;
  *)
    echo "usage: source launch/xla_flags.sh tpu|gpu" >&2
    return 2
    ;;
esac
