#!/usr/bin/env bash
# A run on TPUs of a GKE cluster that has JobSet (https://jobset.sigs.k8s.io):
#
#   IMAGE=region-docker.pkg.dev/project/repo/ddo_jax:1 launch/gke.sh [--print] --config=... --workdir=gs://bucket/run
#
#   IMAGE         with ddo_jax and its extras tpu and gcs installed
#   ACCELERATOR (tpu-v5-lite-podslice), TOPOLOGY (4x4), HOSTS (4), CHIPS (4, a host)
#   NAME (ddo-jax), RESTARTS (100), NAMESPACE (kubectl's own)
#
# Logs of every host: kubectl logs -l jobset.sigs.k8s.io/jobset-name=$NAME --prefix --tail=-1
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
show=
[ "${1:-}" = --print ] && show=1 && shift
: "${IMAGE:?IMAGE: unset; the container image, as in region-docker.pkg.dev/project/repo/ddo_jax:1}"
export IMAGE ACCELERATOR="${ACCELERATOR:-tpu-v5-lite-podslice}" TOPOLOGY="${TOPOLOGY:-4x4}" HOSTS="${HOSTS:-4}"
export CHIPS="${CHIPS:-4}" NAME="${NAME:-ddo-jax}" RESTARTS="${RESTARTS:-100}"
# Pods come one after the other, while nodes are made for them: they wait for each other for ten minutes.
fill='import json, os, string, sys
args = sys.argv[2:]
if not any(a.startswith("--config.hosts.start_s") for a in args):
    args.append("--config.hosts.start_s=600")
given = dict(os.environ, ARGS=json.dumps(args))
print(string.Template(open(sys.argv[1]).read()).substitute(given), end="")'
manifest=$("${PYTHON:-python3}" -c "$fill" "$here/gke.yaml" "$@")
if [ -n "$show" ]; then
  echo "$manifest"
  exit
fi
kubectl apply ${NAMESPACE:+"--namespace=$NAMESPACE"} -f - <<<"$manifest"
