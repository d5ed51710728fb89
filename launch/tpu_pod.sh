#!/usr/bin/env bash
# A run on every host of a Cloud TPU slice, started from where gcloud is logged in; JAX finds the hosts (--distributed).
#
#   TPU_NAME=my-v5e ZONE=us-west4-a launch/tpu_pod.sh [--print] --config=... --workdir=gs://bucket/run
#
#   TPU_NAME, ZONE   of the slice      PROJECT   unset: gcloud's
#   DIR     the repository on every host (ddo_jax; installed there: pip install -e '.[tpu,gcs]')
#   LOGS    folder of the logs here, one a host (logs/$TPU_NAME)
#
# On each host restart.sh continues the run when it is told to leave or a host dies. A slice that was preempted as a whole
# must be made again (queued resources do so); then the same command continues.
set -euo pipefail
show=
[ "${1:-}" = --print ] && show=1 && shift
: "${TPU_NAME:?TPU_NAME: unset; the name of the slice, as gcloud compute tpus tpu-vm list shows it}"
: "${ZONE:?ZONE: unset; the zone of the slice, as in us-west4-a}"
logs=${LOGS:-logs/$TPU_NAME}
remote="cd $(printf %q "${DIR:-ddo_jax}") && launch/restart.sh python -m ddo_jax.main --distributed$(printf ' %q' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--zone=$ZONE" --worker=all "--output-directory=$logs")
[ -n "${PROJECT:-}" ] && command+=("--project=$PROJECT")
command+=("--command=$remote")
if [ -n "$show" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
mkdir -p "$logs"
exec "${command[@]}"
