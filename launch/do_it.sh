# shellcheck shell=bash
# To be sourced: what --dry_run means to every script, by its variable `dry_run`, and where a run writes.

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
