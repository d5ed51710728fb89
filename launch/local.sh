#!/usr/bin/env bash
# N processes on this machine, which share its devices:
#
#   launch/local.sh [--print] [N] --config=... --workdir=...
#
# N = 1 (default): one process with all devices, as `python -m ddo_jax.main`. Of N = 4 each has the GPU of its number; on a
# CPU JAX_NUM_CPU_DEVICES says how many devices each one makes. They are started again together when they are told to
# leave or one of them dies, unless there is something to mend (see restart.sh).
#   PORT   where they meet (29500)      LOGS   folder of N logs, logs/local-0.log ... (logs)
#   PYTHON (python), RESTARTS, PAUSE: see restart.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
show=
[ "${1:-}" = --print ] && show=1 && shift
number=1
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
  number=$1
  shift
fi
for ((i = 0; i < number; i++)); do
  command=("${PYTHON:-python}" -m ddo_jax.main "$@")
  environment=("LOG=${LOGS:-logs}/local-$i.log")
  if [ "$number" -gt 1 ]; then
    command+=("--coordinator=127.0.0.1:${PORT:-29500}" "--num_processes=$number" "--process_id=$i")
    environment+=("JAX_LOCAL_DEVICE_IDS=$i")
  fi
  if [ -n "$show" ]; then
    printf '%q ' env "${environment[@]}" "$here/restart.sh" "${command[@]}"
    echo
  else
    cd "$here/.."
    env "${environment[@]}" "$here/restart.sh" "${command[@]}" &
  fi
done
trap 'kill -TERM $(jobs -p) 2>/dev/null' TERM
trap 'kill -INT $(jobs -p) 2>/dev/null' INT
worst=0
for job in $(jobs -p); do
  while kill -0 "$job" 2>/dev/null; do
    wait "$job" || true # a signal ends the wait, not the job
  done
  code=0
  wait "$job" || code=$?
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
