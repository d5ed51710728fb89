#!/usr/bin/env bash
# One process a node, all GPUs of the node; JAX reads Slurm's variables itself (--distributed).
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=1 launch/slurm.sh --config=... --workdir=/shared/run
#SBATCH --job-name=ddo_jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# A dead host aborts the others without a Python exception: Slurm requeues, the same command continues.
exec srun --kill-on-bad-exit=1 python -m ddo_jax.main --distributed "$@"
