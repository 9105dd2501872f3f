#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, as a JobSet. docs/cluster.md says what the cluster needs.
#
#     launch/gke.sh ACTION NAME [OPTIONS] [-- ARGS of python -m simclr_jax.main]
#
# Actions:
#     apply     write a manifest, and hand it to kubectl
#     status    say what has become of it
#     logs      follow what the first process says
#     delete    end the run and give the chips back
# Options of apply:
#     --accelerator=KIND      GKE's name of the chip: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x, ...
#     --topology=SHAPE        chips of a slice, such as 4x8 or 2x2x4
#     --image=IMAGE           a container with simclr_jax: launch/Dockerfile builds one
#     --slices=N              several slices, joined by the data-centre network     (default: 1)
#     --chips_per_host=N      chips of a machine                                    (default: 4, or all)
#     --service_account=NAME  of Kubernetes, that may write to the bucket           (default: default)
#     --restarts=N            of lost hosts and the like; each resumes from the newest checkpoint (default: 100)
#     --file=FILE             where to write the manifest                           (default: /tmp/NAME.json)
#     --dry_run               write the manifest, print the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/do_it.sh

# json STRING ...: a list of JSON strings.
json() {
  local text list=()
  for text in "$@"; do
    [[ $text != *[[:cntrl:]]* ]] || fail "an argument has a line break or another control character: $text"
    # Kubernetes would put its variables in place of $(NAME).
    # shellcheck disable=SC2016
    text=${text//'$('/'$$('}
    text=${text//\\/\\\\}
    list+=("\"${text//\"/\\\"}\"")
  done
  local IFS=,
  echo "[${list[*]}]"
}

chips_of() {
  local chips=1 side
  for side in ${1//x/ }; do chips=$((chips * side)); done
  echo "$chips"
}

# Exit statuses 1, 2, 126 and 127 are mistakes of the user's, which no restart mends; all others are restarted.
# Kubernetes takes JSON as well as YAML, and in JSON nothing depends on how an argument is written.
manifest() {
  cat << END
{
  "apiVersion": "jobset.x-k8s.io/v1alpha2",
  "kind": "JobSet",
  "metadata": {
    "name": "$name",
    "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  },
  "spec": {
    "failurePolicy": {
      "maxRestarts": $restarts,
      "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    },
    "replicatedJobs": [
      {
        "name": "slice",
        "replicas": $slices,
        "template": {
          "spec": {
            "parallelism": $hosts,
            "completions": $hosts,
            "backoffLimit": 0,
            "podFailurePolicy": {
              "rules": [{"action": "FailJob", "onExitCodes": {"containerName": "simclr", "operator": "In", "values": [1, 2, 126, 127]}}]
            },
            "template": {
              "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 120,
                "serviceAccountName": "$service_account",
                "nodeSelector": {
                  "cloud.google.com/gke-tpu-accelerator": "$accelerator",
                  "cloud.google.com/gke-tpu-topology": "$topology"
                },
                "containers": [
                  {
                    "name": "simclr",
                    "image": "$image",
                    "workingDir": "/simclr_jax",
                    "command": ["bash", "-c", "source launch/xla_flags.sh tpu && exec python -u -m simclr_jax.main \"\$@\"", "simclr"],
                    "args": $quoted,
                    "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
                    "resources": {"limits": {"google.com/tpu": $chips_per_host}}
                  }
                ]
              }
            }
          }
        }
      }
    ]
  }
}
END
}

apply() {
  [[ -n $accelerator && -n $image ]] || fail "apply needs --accelerator, --topology and --image"
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology=$topology: expected a shape such as 4x8 or 2x2x4"
  [[ "$accelerator$image$service_account" =~ ^[-a-zA-Z0-9._/:@]+$ ]] || fail "--accelerator, --image or --service_account has a character that no such name has"
  local number chips
  for number in "$slices" "$restarts" "${chips_per_host:-1}"; do
    # JSON has no leading zeros, and bash takes them for octal numbers.
    [[ $number =~ ^(0|[1-9][0-9]*)$ ]] || fail "$number: expected a number without leading zeros"
  done
  chips=$(chips_of "$topology")
  chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
  ((chips_per_host > 0 && chips % chips_per_host == 0)) || fail "--chips_per_host=$chips_per_host does not divide the $chips chips of $topology"
  hosts=$((chips / chips_per_host))
  [[ $(workdir_of ${args[@]+"${args[@]}"}) == gs://* ]] || fail "a container's own disk is lost when it restarts: give -- ... --workdir=gs://BUCKET/FOLDER"
  quoted=$(json ${args[@]+"${args[@]}"}) || exit 2
  manifest > "$file"
  echo "written: $file, $slices slice(s) of $hosts host(s) with $chips_per_host chip(s)"
  do_it kubectl apply -f "$file"
}

(($# >= 2)) || usage
action=$1 name=$2
shift 2
# GKE makes NAME-slice-0-0-xxxxx of it, of at most 63 characters.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "the run's name comes second: up to 40 lower-case letters, digits and dashes, not $name"
accelerator='' topology='' image='' slices=1 chips_per_host='' service_account=default restarts=100
file=/tmp/$name.json dry_run='' args=()
while (($#)); do
  case $1 in
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --chips_per_host=*) chips_per_host=${1#*=} ;;
    --service_account=*) service_account=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --file=*) file=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      args=("$@")
      break
      ;;
    *) fail "unknown option $1: see the head of launch/gke.sh" ;;
  esac
  shift
done
case $action in
  apply) apply ;;
  status)
    do_it kubectl get jobset "$name"
    do_it kubectl get jobs,pods --selector="jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  logs) do_it kubectl logs --follow --tail=-1 --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" ;;
  delete) do_it kubectl delete "jobset/$name" ;;
  *) usage ;;
esac
