#!/usr/bin/env bash
# Run a command until it is done:  launch/restart.sh python -m ddo_jax.main --config=... --workdir=...
#
# Exit codes of ddo_jax.main: 0 done, 2 something to mend, 75 told to leave (SIGTERM), 130 Ctrl-C; anything else is a
# crash, or a host that died and took the others with it. 0, 2 and 130 end it; else the same command continues the run.
#   RESTARTS   how often at most (100)      PAUSE   seconds before it (10)
#   LOG        a file that everything is appended to, beside the terminal (none)
set -uo pipefail
if [ -n "${LOG:-}" ]; then
  mkdir -p "$(dirname "$LOG")"
  exec > >(exec tee -a "$LOG") 2>&1
fi
child=
# A signal to this script is one to the run, which then leaves in order; it is not started again.
left=
trap 'left=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM
trap 'left=1; [ -n "$child" ] && kill -INT "$child" 2>/dev/null' INT
for ((i = 0; ; i++)); do
  "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the run
    wait "$child"
  done
  wait "$child" # the shell keeps the code of a run that is over: the waits before it may have told of a signal
  code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ "$code" -eq 130 ] || [ -n "$left" ]; then
    exit "$code"
  fi
  if [ "$i" -ge "${RESTARTS:-100}" ]; then
    echo "exit code $code, and it was started again $i times: giving up" >&2
    exit "$code"
  fi
  echo "exit code $code: starting again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}" &
  wait $! || true # a signal ends the pause
  [ -n "$left" ] && exit "$code"
done
