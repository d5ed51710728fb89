#!/usr/bin/env bash
# Run on every host of a TPU pod slice; JAX finds the others by the TPU's metadata (--distributed).
#   gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
#     --command="cd ddo_jax && launch/tpu_pod.sh --config=... --workdir=gs://bucket/run"
set -euo pipefail
cd "$(dirname "$0")/.."
until python -m ddo_jax.main --distributed "$@"; do
  code=$?
  [ "$code" -eq 2 ] && exit 2   # something to mend: starting again would not help
  echo "exit code $code: starting again in 20 s" >&2
  sleep 20
done
