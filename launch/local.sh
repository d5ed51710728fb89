#!/usr/bin/env bash
# This machine, all its devices:  launch/local.sh --config=configs/digits.py --workdir=runs/digits
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m ddo_jax.main "$@"
