#!/usr/bin/env bash
# One process a node with all its GPUs; JAX reads Slurm's variables itself (--distributed). Outside a job it submits itself:
#
#   NODES=2 launch/slurm.sh [--print] --config=... --workdir=/shared/run
#
#   NODES (1), GPUS (8, a node), CPUS (16, a process), TIME (24:00:00), PARTITION, ACCOUNT (the cluster's own defaults)
#   LOGS     folder of the logs, one a host (logs)      PYTHON (python)
#   SBATCH   more options for sbatch, as in SBATCH="--qos=low --mem=0"
#
# Two minutes before the time is over, and when the job is preempted, Slurm sends SIGTERM: the run saves and leaves with
# code 75, and the job is requeued; so it is when a host dies. Not when it is done, or there is something to mend (code 2).
set -euo pipefail
show=
[ "${1:-}" = --print ] && show=1 && shift
logs=${LOGS:-logs}
work=(srun --kill-on-bad-exit=1 "--output=$logs/%x-%j-%N.log" --open-mode=append)
work+=("${PYTHON:-python}" -m ddo_jax.main --distributed "$@")
submit=(sbatch "--nodes=${NODES:-1}" "--gpus-per-node=${GPUS:-8}" --ntasks-per-node=1 "--cpus-per-task=${CPUS:-16}")
submit+=("--time=${TIME:-24:00:00}" --job-name=ddo_jax --requeue --signal=TERM@120 "--output=$logs/%x-%j.log")
submit+=(--open-mode=append)
[ -n "${PARTITION:-}" ] && submit+=("--partition=$PARTITION")
[ -n "${ACCOUNT:-}" ] && submit+=("--account=$ACCOUNT")
read -ra more <<<"${SBATCH:-}"
submit+=(${more[@]+"${more[@]}"} "$0" "$@")
if [ -n "$show" ]; then
  printf '%q ' "${submit[@]}"
  printf '\n  on the first node: '
  printf '%q ' "${work[@]}"
  echo
  exit
fi
mkdir -p "$logs"
[ -z "${SLURM_JOB_ID:-}" ] && exec "${submit[@]}"
cd "${SLURM_SUBMIT_DIR:-.}"
code=0
"${work[@]}" || code=$?
case $code in
  0 | 2 | 130) exit "$code" ;;
esac
echo "exit code $code: requeued" >&2
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
