#!/usr/bin/env bash
# A run on several GPU nodes under SLURM, one process a GPU.
#
#     launch/slurm.sh --nodes=N --gpus=G [--dry_run] [SBATCH OPTIONS] -- ARGS of python -m simclr_jax.main
#
# G is the number of GPUs of a node. Outside of an allocation it submits itself with sbatch; inside
# (the submitted job, or salloc) it starts the processes with srun. The processes find each other by
# SLURM's variables. A job that a signal stopped while it may still run, as --signal=TERM@120 sends it 120 s
# before its time is up, is queued again; one that is cancelled is not. Of a study an array of jobs, --array=1-N, makes N parts. A job that is preempted or whose node fails is put back into the queue and goes
# on from the newest checkpoint. `python` must be that of the environment simclr_jax is installed in.
set -euo pipefail

# Inside a job SLURM runs a copy of this script: the repository is where the job was told to be.
[[ -n ${SLURM_JOB_ID:-} && -e launch/do_it.sh ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/do_it.sh

usage() {
  echo "usage: launch/slurm.sh --nodes=N --gpus=G [--dry_run] [SBATCH OPTIONS] -- ARGS of python -m simclr_jax.main" >&2
  exit 2
}

nodes='' gpus='' dry_run='' options=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    *) options+=("$1") ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ && ${1:-} == -- ]] || usage
shift
(($#)) || usage

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  do_it sbatch --job-name=simclr --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --requeue --open-mode=append --chdir="$PWD" "${options[@]}" \
    launch/slurm.sh --nodes="$nodes" --gpus="$gpus" -- "$@"
  exit
fi

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  [[ " $* " == *" --mode=study "* ]] || {
    echo "--array is for --mode=study: it makes each job a part of the study" >&2
    exit 2
  }
  set -- "$@" --part=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:?} + 1))/"$SLURM_ARRAY_TASK_COUNT"
fi

# shellcheck source=launch/xla_flags.sh
source launch/xla_flags.sh gpu
# --kill-on-bad-exit: SLURM, too, ends all processes when one fails.
status=0
do_it srun --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 python -m simclr_jax.main "$@" || status=$?
# Stopped by a signal, and saved; or ended by SIGTERM (143) before the first step. SLURM itself queues a job
# again whose node failed or that was preempted.
if ((status == 75 || status == 143)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  echo "stopped before the end: queued again, to go on from the newest checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
