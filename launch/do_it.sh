# shellcheck shell=bash
# To be sourced: what --dry_run means to every script, by its variable `dry_run`, where a run writes, and how a script ends
# that was called wrongly.

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

fail() {
  echo "error: $1" >&2
  exit 2
}

# Prints the head of the script, and ends it.
usage() {
  sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "launch/$(basename "$0")" >&2
  exit 2
}
