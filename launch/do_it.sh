# shellcheck shell=bash
# To be sourced by the other scripts: runs a command, or prints it if their variable `dry_run` is set; finds the
# workdir among a run's arguments; knows the exit statuses of mistakes; ends a script that was called wrongly.

# do_it COMMAND ...: runs it, or prints it so that it can be pasted.
do_it() {
  if [[ -n ${dry_run:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# workdir_of ARGS ...: prints the value of --workdir=VALUE or --workdir VALUE.
workdir_of() {
  while (($#)); do
    case $1 in
      --workdir=*) echo "${1#*=}" ;;
      --workdir) echo "${2:-}" ;;
    esac
    shift
  done
}

# is_mistake STATUS: succeeds if a run that ended with this status would end so again: by a mistake of the user's (1, 2),
# or as a command that cannot be run (126, 127).
is_mistake() {
  [[ $1 =~ ^(1|2|126|127)$ ]]
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Prints the head of the script, and ends it.
usage() {
  sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "launch/$(basename "$0")" >&2
  exit 2
}
