#!/usr/bin/env bash
# Runs `python -m simclr_jax.main ARGS` as N processes of one run on this machine.
#
#     launch/local.sh N -- ARGS
#
# To try out what several hosts do, or to give each of several accelerators its own process. On a CPU,
# XLA_FLAGS=--xla_force_host_platform_device_count=D gives every process D devices.
# When a process fails the others end too; the first failure's status is the script's. It is 75 if a signal
# has stopped the run: the same command resumes from there.
set -euo pipefail

# The others end by themselves within a minute (simclr_jax/processes.py); after this they are killed.
grace_seconds=90

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || $2 != -- ]]; then
  echo "usage: launch/local.sh N -- ARGS     N processes, ARGS of python -m simclr_jax.main" >&2
  exit 2
fi
count=$1
shift 2

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
pids=()
for ((i = 0; i < count; i++)); do
  python -m simclr_jax.main "$@" \
    --coordinator="127.0.0.1:$port" --processes="$count" --process="$i" &
  pids[i]=$!
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT

status=0
deadline=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    if ! kill -0 "${pids[i]}" 2> /dev/null; then
      code=0
      wait "${pids[i]}" || code=$?
      unset 'pids[i]'
      if ((code != 0 && status == 0)); then
        status=$code
        deadline=$((SECONDS + grace_seconds))
        if ((${#pids[@]} && code != 75)); then
          echo "error: process $i of $count ended with status $code, so the others end too" >&2
        fi
      fi
    elif [[ -n $deadline ]] && ((SECONDS > deadline)); then
      kill -KILL "${pids[i]}" 2> /dev/null || true
    fi
  done
  sleep 0.2
done
exit "$status"
