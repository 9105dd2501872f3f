#!/usr/bin/env bash
# A run on GPU nodes under SLURM, one process a GPU.
#
#     launch/slurm.sh --nodes=N --gpus-per-node=[TYPE:]G [OPTIONS] [SBATCH OPTIONS] -- ARGS of python -m simclr_jax.main
#
# Outside of an allocation it submits itself with sbatch; inside (the submitted job, or salloc) it starts the
# processes with srun, and they find each other by SLURM's variables. Relative paths in ARGS begin at the repository.
#
# Options, and those of sbatch with a meaning of their own here:
#     --gpus=[TYPE:]G     of the whole job, as SLURM means it, in place of --gpus-per-node; a multiple of the nodes
#     --prelude=FILE      sourced on each node before the process starts, for modules or an environment; without it
#                         `python` must be that of the environment simclr_jax is installed in
#     --container...=...  SLURM's or pyxis's: the processes run in the container, this script beside it
#     --signal=TERM@S     S seconds before the time limit the run saves, and is queued again      (default: 120)
#     --restarts=N        a process that dies or hangs ends the job if it was queued again N times, for whatever
#                         reason                                                                  (default: 100)
#     --array=1-N         of a study: N jobs, each of which makes a part
#     --dry_run           print the command
#
# A job is queued again, and resumes from the newest checkpoint, if it is preempted, its node fails, its time limit
# comes, or one of its processes dies or hangs. It is not queued again if it was cancelled, or ended by a mistake
# that the user has to mend.
set -euo pipefail

from=$PWD
# Inside a job SLURM runs a copy of this script: the repository is where the job was told to be.
[[ -n ${SLURM_JOB_ID:-} && -e launch/do_it.sh ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/do_it.sh

# run_again STATUS: succeeds if the job is to be queued again. srun ends with the highest status of the processes: 0
# done; 75 stopped by a signal, and saved. A process that ends by a mistake also makes the file $SIMCLR_MISTAKE, as the
# other processes then end with other statuses.
run_again() {
  [[ ! -e $SIMCLR_MISTAKE ]] && ! is_mistake "$1" || return 1
  case $1 in
    0) return 1 ;;
    75) said="stopped before the end" ;;
    *)
      said="ended with status $1"
      ((${SLURM_RESTART_COUNT:-0} < restarts)) || return 1
      ;;
  esac
  # A cancelled job is COMPLETING, and SLURM itself queues a preempted one again: requeue only a RUNNING job.
  [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]
}

nodes='' gpus='' gpus_per_node='' prelude='' restarts=100 signal=--signal=TERM@120 dry_run=''
of_sbatch=() of_srun=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    -N | -G)
      (($# > 1)) || usage
      if [[ $1 == -N ]]; then nodes=$2; else gpus=$2; fi
      shift
      ;;
    -N*) nodes=${1#-N} ;;
    -G*) gpus=${1#-G} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --gpus-per-node=*) gpus_per_node=${1#*=} ;;
    --prelude=*) prelude=$(cd "$from" && realpath -e -- "${1#*=}") || fail "$1: expected a file that is there" ;;
    --container*) of_srun+=("$1") ;;
    --signal=*) signal=$1 ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --gres=*gpu*) fail "$1: give --gpus-per-node for GPUs" ;;
    --chdir* | -D*) fail "$1: a job runs in this repository" ;;
    --gpus-per-task* | -n | -n[0-9]* | --ntasks*)
      fail "$1: there is one process a GPU, which has to see all of its node; give --gpus-per-node"
      ;;
    *) of_sbatch+=("$1") ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ && ${1:-} == -- && -n ${2:-} && $restarts =~ ^[0-9]+$ ]] || usage
shift

kind=''
[[ $gpus$gpus_per_node != *:* ]] || kind=${gpus_per_node:-$gpus} kind=${kind%:*}:
count=${gpus_per_node:-$gpus} count=${count##*:}
[[ $count =~ ^[1-9][0-9]*$ && ! (-n $gpus && -n $gpus_per_node) ]] || usage
if [[ -n $gpus ]]; then
  ((count % nodes == 0)) || fail "--gpus=$gpus: expected a multiple of the $nodes nodes; --gpus-per-node is for each"
  count=$((count / nodes))
fi
place=(--nodes="$nodes" --ntasks-per-node="$count" --gpus-per-node="$kind$count")

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "$nodes node(s) with $count GPU(s) and processes each" >&2
  do_it sbatch --job-name=simclr "${place[@]}" --requeue --open-mode=append --chdir="$PWD" "$signal" \
    ${of_sbatch[@]+"${of_sbatch[@]}"} launch/slurm.sh --nodes="$nodes" --gpus-per-node="$kind$count" \
    --restarts="$restarts" ${prelude:+--prelude="$prelude"} ${of_srun[@]+"${of_srun[@]}"} -- "$@"
  exit
fi

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  [[ " $* " == *" --mode=study "* ]] || fail "--array is for --mode=study: it makes each job a part of the study"
  set -- "$@" --part=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:?} + 1))/"$SLURM_ARRAY_TASK_COUNT"
fi

# shellcheck source=launch/xla_flags.sh
source launch/xla_flags.sh gpu
run=(python -m simclr_jax.main "$@")
# Source the prelude without arguments, as conda's activate would take them for its own.
# shellcheck disable=SC2016
[[ -z $prelude ]] || run=(bash -c 'file=$0 run=("$@"); set --; source "$file" || { echo "error: $file failed" >&2; exit 2; }; exec "${run[@]}"' "$prelude" "${run[@]}")
# Name the one job of an array, as SLURM_JOB_ID may be the number of the whole array.
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID:-}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
export SIMCLR_MISTAKE=$PWD/.mistake_in_job_$job
rm -f "$SIMCLR_MISTAKE"
status=0
# When a process fails the others end by themselves within a minute, or, if it has not joined them, within half an hour
# (simclr_jax/processes.py).
do_it srun "${place[@]}" ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  ${of_srun[@]+"${of_srun[@]}"} "${run[@]}" || status=$?
if run_again "$status"; then
  if scontrol requeue "$job"; then
    echo "$said: queued again, to go on from the newest checkpoint"
  else
    echo "$said: cannot be queued again; the same command resumes from the newest checkpoint" >&2
  fi
fi
rm -f "$SIMCLR_MISTAKE"
exit "$status"
