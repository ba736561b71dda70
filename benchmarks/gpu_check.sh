#!/usr/bin/env bash
# What only a GPU can tell, in parts of at most 8 minutes each: tests, runs, speed, memory, cards.
#
#   benchmarks/gpu_check.sh                       all parts
#   benchmarks/gpu_check.sh runs memory           some of them
#   benchmarks/gpu_check.sh --dry                 on a CPU with a tiny model: do the parts work?
#   WHEELS=wheels benchmarks/gpu_check.sh tests   on a machine without network
#
# With WHEELS, packages that the machine's Python lacks come from that folder, into an environment of
# their own that sees what the machine has; torch is never replaced. Needs no network then.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3}
if [[ -n ${WHEELS:-} ]]; then
  if [[ ! -x runs/gpu-check/env/bin/python ]]; then
    "$PY" -m venv --system-site-packages runs/gpu-check/env
    runs/gpu-check/env/bin/python -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
  fi
  PY=runs/gpu-check/env/bin/python
fi
options=() parts=()
for word in "$@"; do
  if [[ $word == --* ]]; then options+=("$word"); else parts+=("$word"); fi
done
((${#parts[@]})) || parts=(tests runs speed memory cards)
mkdir -p runs
failed=0
for part in "${parts[@]}"; do
  timeout 480 "$PY" benchmarks/gpu_check.py "${options[@]}" "$part" >"runs/gpu-check.$part.log" 2>&1 || failed=1
  grep "^$part:" "runs/gpu-check.$part.log" || tail -3 "runs/gpu-check.$part.log"
done
"$PY" benchmarks/gpu_check.py "${options[@]}" table
exit $failed
