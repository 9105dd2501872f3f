#!/usr/bin/env bash
# A run on a slice of Cloud TPU VMs, from request to removal. docs/cluster.md tells the whole way.
#
#     launch/tpu_vm.sh ACTION NAME [OPTIONS] [-- ARGS of python -m simclr_jax.main]
#
# Actions:
#     create    request the slice; it comes when there is room
#     setup     wait for it, copy this commit to all hosts, install it
#     run       start the run on all hosts; it goes on when you log out
#     logs      follow what the run says
#     resume    after a preemption: request, set up and run again; the run goes on where it was saved
#     delete    give the slice back
# Options:
#     --zone=ZONE          where, such as us-west4-a                       (default: gcloud's)
#     --type=TYPE          slice, such as v5litepod-64, v4-64 or v6e-64     (create, resume)
#     --version=VERSION    of the VM's software                            (default: by type)
#     --spot               cheaper, and may be taken away                  (create, resume)
#     --host=N             whose log to follow                             (default: 0)
#     --dry_run            print the commands instead of running them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/do_it.sh

fail() {
  echo "error: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' launch/tpu_vm.sh >&2
  exit 2
}

gcloud_tpus() {
  local command=("$@")
  do_it gcloud compute tpus "${command[@]}" ${zone:+--zone="$zone"}
}

on_hosts() {
  gcloud_tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

version_of() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "no --version is known for --type=$1: give one, see the TPU software versions in Google's documentation" ;;
  esac
}

state() {
  gcloud compute tpus queued-resources describe "$name" ${zone:+--zone="$zone"} \
    --format='value(state.state)' 2> /dev/null || echo MISSING
}

create() {
  [[ -n $type ]] || fail "create and resume need --type, such as --type=v5litepod-64"
  version=${version:-$(version_of "$type")}
  gcloud_tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
}

wait_until_active() {
  if [[ -n $dry_run ]]; then
    echo "# wait until: gcloud compute tpus queued-resources describe $name says ACTIVE"
    return
  fi
  local now last=
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDING | SUSPENDED | MISSING)
        fail "the slice $name is $now: use resume to request it again, or delete" ;;
    esac
    [[ $now == "$last" ]] || echo "$(date +%H:%M:%S) $name is $now"
    last=$now
    sleep "${POLL_SECONDS:-30}"
  done
  echo "$(date +%H:%M:%S) $name is ACTIVE"
}

setup() {
  wait_until_active
  # What is committed, and nothing else: the run can be told by its commit.
  do_it git archive --format=tar.gz --output=/tmp/simclr_jax.tar.gz HEAD
  gcloud_tpus tpu-vm scp /tmp/simclr_jax.tar.gz "$name:" --worker=all
  # The image's own Python may be older than 3.11: uv brings one.
  on_hosts all "mkdir -p simclr_jax && tar xzf simclr_jax.tar.gz -C simclr_jax && cd simclr_jax && (command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh) && ~/.local/bin/uv venv --allow-existing --python=3.12 && ~/.local/bin/uv pip install -e '.[tpu]'"
}

run() {
  ((${#args[@]})) || fail "run and resume need the run's arguments: -- --config=... --workdir=gs://..."
  local quoted
  quoted=$(printf '%q ' "${args[@]}")
  [[ $quoted == *--workdir=gs://* ]] ||
    fail "a run on several hosts needs a workdir that all of them see: --workdir=gs://BUCKET/FOLDER"
  on_hosts all "cd simclr_jax && if [ -e ~/simclr.pid ] && kill -0 \$(cat ~/simclr.pid) 2> /dev/null; then echo 'a run is under way here: see logs' >&2; exit 1; fi; source launch/xla_flags.sh tpu && { nohup .venv/bin/python -u -m simclr_jax.main $quoted> ~/simclr.log 2>&1 < /dev/null & } && echo \$! > ~/simclr.pid"
}

logs() {
  on_hosts "$host" "tail -n 100 -F ~/simclr.log"
}

delete() {
  # --force: also the VMs of an active request.
  gcloud_tpus queued-resources delete "$name" --force --quiet
}

resume() {
  local now=SUSPENDED
  [[ -n $dry_run ]] || now=$(state)
  case $now in
    ACTIVE) # the VMs are there, the run is not
      run
      return
      ;;
    MISSING) ;;
    SUSPENDING | SUSPENDED | FAILED) delete ;; # what was taken away is requested anew
    *) # still in the queue: keep the place
      setup
      run
      return
      ;;
  esac
  create
  setup
  run
}

(($# >= 2)) || usage
action=$1 name=$2
shift 2
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "the slice's name comes second: lower-case letters, digits and dashes, not $name"
zone='' type='' version='' spot='' host=0 dry_run='' args=()
while (($#)); do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --host=*) host=${1#*=} ;;
    --spot) spot=yes ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      args=("$@")
      break
      ;;
    *) fail "unknown option $1: see the head of launch/tpu_vm.sh" ;;
  esac
  shift
done
case $action in
  create | setup | run | logs | resume | delete) "$action" ;;
  *) usage ;;
esac
