#!/usr/bin/env bash
# A run on a slice of Cloud TPU VMs, from request to removal. docs/cluster.md tells the whole way.
#
#     launch/tpu_vm.sh ACTION NAME [OPTIONS] [-- ARGS of python -m simclr_jax.main]
#
# Actions:
#     create    request the slice; it comes when there is room
#     setup     wait for it, copy this commit to all hosts, install it
#     run       start the run on all hosts; it goes on when you log out
#     status    say what has become of the slice, and of the run on each host
#     logs      follow what the run says; --host=all shows the last lines of every host
#     stop      have the run save and end
#     resume    after a preemption: request, set up and run again; the run goes on where it was saved
#     babysit   resume whenever the slice is taken away or the run stops early, until it is done or ends by a mistake
#     delete    give the slice back
# Options:
#     --zone=ZONE          where, such as us-west4-a                       (default: gcloud's)
#     --type=TYPE          slice, such as v5litepod-64, v4-64 or v6e-64     (create, resume, babysit)
#     --version=VERSION    of the VM's software                            (default: by type)
#     --spot               cheaper, and may be taken away                  (create, resume, babysit)
#     --host=N             whose log to follow                             (default: 0)
#     --gcloud=OPTION      passed on to gcloud with create, resume and babysit, such as --gcloud=--network=NET; may be repeated
#     --dry_run            print the commands instead of running them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/do_it.sh

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

# Prints the state of the request, MISSING if there is none. Fails if gcloud cannot say: an expired login or a
# network that is down must not lead to a second slice.
state() {
  local said errors status=0
  errors=$(mktemp) # stderr apart: gcloud prints warnings there even if it succeeds
  said=$(gcloud compute tpus queued-resources describe "$name" ${zone:+--zone="$zone"} \
    --format='value(state.state)' 2> "$errors") || status=$?
  if ((status == 0)); then
    echo "$said"
  elif grep -q NOT_FOUND "$errors"; then
    echo MISSING
  else
    cat "$errors" >&2
    echo "error: gcloud cannot say what has become of $name" >&2
  fi
  ((status == 0)) || grep -q NOT_FOUND "$errors" || status=-1
  rm -f "$errors"
  ((status != -1))
}

# The checks of an action's flags come before the action: resume gives back a slice that was taken away, and requests it
# anew, before it comes to the run.
check_can_request() {
  [[ -n $type ]] || fail "$action needs --type, such as --type=v5litepod-64"
  version=${version:-$(version_of "$type")}
}

check_can_run() {
  ((${#args[@]})) || fail "$action needs the run's arguments: -- --config=... --workdir=gs://..."
  [[ $(workdir_of "${args[@]}") == gs://* ]] ||
    fail "a run on several hosts needs a workdir that all of them see: --workdir=gs://BUCKET/FOLDER"
}

create() {
  gcloud_tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot} ${more[@]+"${more[@]}"}
}

wait_until_active() {
  if [[ -n $dry_run ]]; then
    echo "# wait until: gcloud compute tpus queued-resources describe $name says ACTIVE"
    return
  fi
  local now last='' unheard=0
  while :; do
    if ! now=$(state); then # a network that is down for a moment
      unheard=$((unheard + 1))
      ((unheard < 10)) || fail "gcloud has not answered 10 times in a row"
      sleep "${POLL_SECONDS:-30}"
      continue
    fi
    unheard=0
    case $now in
      ACTIVE) break ;;
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
  [[ -z $(git status --porcelain --untracked-files=no) ]] ||
    echo "warning: there are changes that are not committed, and are left behind: $(git status --porcelain --untracked-files=no | head -n 3 | tr '\n' ' ')" >&2
  local folder=/tmp # where the commands are only printed
  if [[ -z $dry_run ]]; then
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
  fi
  do_it git archive --format=tar.gz --output="$folder/simclr_jax.tar.gz" HEAD
  gcloud_tpus tpu-vm scp "$folder/simclr_jax.tar.gz" "$name:" --worker=all
  # What an earlier setup left is removed first: a file that is gone since must not be found. The image's own Python may be older than 3.11: uv brings one.
  on_hosts all "mkdir -p simclr_jax && rm -rf simclr_jax/{simclr_jax,configs,launch} && tar xzf simclr_jax.tar.gz -C simclr_jax && cd simclr_jax && (command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh) && ~/.local/bin/uv venv --allow-existing --python=3.12 && ~/.local/bin/uv pip install -e '.[tpu,report,studies]' && touch .set_up"
}

run() {
  local quoted
  quoted=$(printf '%q ' "${args[@]}")
  on_hosts all "cd simclr_jax && if [ -e ~/simclr.pid ] && kill -0 \$(cat ~/simclr.pid) 2> /dev/null; then echo 'a run is under way here: see logs' >&2; exit 1; fi; source launch/xla_flags.sh tpu && rm -f ~/simclr.status ~/simclr.stopped && echo $(digest) > ~/simclr.run && echo \"--- \$(date) $quoted\" >> ~/simclr.log && { nohup bash -c '.venv/bin/python -u -m simclr_jax.main \"\$@\"; echo \$? > ~/simclr.status' simclr $quoted>> ~/simclr.log 2>&1 < /dev/null & } && echo \$! > ~/simclr.pid"
}

# Tells runs apart by their arguments: a host keeps the status of its last run until the next one starts.
digest() {
  printf '%q ' "${args[@]}" | cksum | tr -d ' \n'
}

# What a host says of its run: "running", "stopped" by the action (75: saved; 143: before there was anything to save),
# "ended STATUS" or "no run".
said_of_run="if [ -e ~/simclr.stopped ] && grep -qsxE '75|143' ~/simclr.status; then echo stopped; elif [ -e ~/simclr.status ]; then echo \"ended \$(cat ~/simclr.status)\"; elif [ -e ~/simclr.pid ] && kill -0 \$(cat ~/simclr.pid) 2> /dev/null; then echo running; else echo 'no run'; fi"

status() {
  if [[ -z $dry_run ]]; then
    local now
    now=$(state) || exit 1
    echo "$name is $now"
    [[ $now == ACTIVE ]] || return 0
  fi
  on_hosts all "$said_of_run; tail -n 1 ~/simclr.log"
}

logs() {
  if [[ $host == all ]]; then
    on_hosts all "tail -n 20 ~/simclr.log"
  else
    on_hosts "$host" "tail -n 100 -F ~/simclr.log"
  fi
}

stop() {
  on_hosts all "touch ~/simclr.stopped; [ -e ~/simclr.pid ] && pkill -TERM -P \$(cat ~/simclr.pid)" # the program that this pid's shell runs
}

# Ends what is left of a run on every host: one host may wait for another that has ended.
clear_hosts() {
  on_hosts all "[ ! -e ~/simclr.pid ] || { pkill -TERM -P \$(cat ~/simclr.pid); for i in \$(seq 30); do kill -0 \$(cat ~/simclr.pid) 2> /dev/null || exit 0; sleep 2; done; pkill -KILL -P \$(cat ~/simclr.pid); } || true"
}

# Looks after a run until its first host says that it ended with status 0 or was stopped by the action `stop`, or the
# slice is given back. An error that comes back at once would come back for ever: after three in a row that lasted less
# than 40 minutes it gives up (hosts wait 30 for one that does not come), after a hundred in all, and after ten attempts
# in a row to resume it that failed. A slice that is taken away counts as none of these.
babysit() {
  local now said began=$SECONDS short=0 early=0 refused=0 unheard=0 seen=''
  if [[ -n $dry_run ]]; then
    resume
    return
  fi
  while :; do
    said=unknown
    if now=$(state); then
      said=lost
      [[ $now != MISSING || -z $seen ]] || fail "the slice $name is given back: to request it anew, babysit again"
      if [[ $now == ACTIVE ]]; then
        seen=yes
        # What ended may have been an earlier run, with other arguments.
        said=$(on_hosts 0 "if ! grep -qsx $(digest) ~/simclr.run; then rm -f ~/simclr.status; fi; $said_of_run") || said=unknown
      fi
    fi
    [[ $said == unknown ]] && unheard=$((unheard + 1)) || unheard=0
    case $said in
      running) ;;
      unknown)
        ((unheard % 10)) || echo "$(date +%H:%M:%S) $name has not answered $unheard times in a row" >&2
        ;;
      stopped)
        echo "$(date +%H:%M:%S) the run on $name was stopped: resume goes on"
        return
        ;;
      "ended 0")
        echo "$(date +%H:%M:%S) the run on $name is done"
        return
        ;;
      *)
        if [[ $said == ended* ]]; then
          ! is_mistake "${said#ended }" || fail "the run on $name ended by a mistake ($said): see logs"
          ((SECONDS - began < ${SHORT_SECONDS:-2400})) && short=$((short + 1)) || short=0
          early=$((early + 1))
          ((early <= ${RESTARTS:-100})) || fail "the run on $name ended early $early times ($said): see logs"
          ((short < 3)) || fail "the run on $name ended early three times in a row ($said): see logs"
          clear_hosts || true
        fi
        echo "$(date +%H:%M:%S) $name is $now, the run: $said; resuming"
        seen='' # resume may give the slice back itself, and then fail to request it
        # Resume in a process of its own: if it fails (a slice lost meanwhile, a host not ready), it is tried again.
        if launch/tpu_vm.sh resume "${given[@]}"; then
          began=$SECONDS refused=0
        else
          refused=$((refused + 1))
          ((refused < 10)) || fail "$name could not be resumed ten times in a row"
        fi
        ;;
    esac
    sleep "${POLL_SECONDS:-60}"
  done
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
      on_hosts all "[ -e simclr_jax/.set_up ]" || setup
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
shift
given=("$@")
shift
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "the slice's name comes second: lower-case letters, digits and dashes, not $name"
zone='' type='' version='' spot='' host=0 dry_run='' args=() more=()
while (($#)); do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --host=*) host=${1#*=} ;;
    --gcloud=*) more+=("${1#*=}") ;;
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
  create | resume | babysit) check_can_request ;;
esac
case $action in
  run | resume | babysit) check_can_run ;;
esac
case $action in
  create | setup | run | status | logs | stop | resume | babysit | delete) "$action" ;;
  *) usage ;;
esac
