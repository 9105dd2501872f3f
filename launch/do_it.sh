# shellcheck shell=bash
# To be sourced: what --dry_run means to every script, by its variable `dry_run`.

# do_it COMMAND ...: runs it, or prints it so that it can be pasted.
do_it() {
  if [[ -n ${dry_run:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
