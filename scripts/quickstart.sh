#!/usr/bin/env bash
# Set-up, then the main job on the machine in front of you. `scripts/quickstart.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: scripts/quickstart.sh [KEY=VALUE…] [--help]

Sets the CPU stack up (scripts/setup.sh), makes the tiny world's data if there is none, and trains its small model with SC-SDPO
on the real stack (verl, Ray, vLLM, FSDP). No GPU, account or download of a model is needed.

KEY=VALUE overrides the configuration, for example: scripts/quickstart.sh method=grpo run.steps=5
EOF
}

say() { printf '[quickstart] %s\n' "$*"; }

case ${1:-} in -h | --help) usage && exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A machine with a GPU may hold the CUDA stack in .venv already; the CPU stack then gets a folder of its own.
if [[ -z ${VENV:-} ]] && grep -qs '^variant=cuda$' .venv/.setup-stamp; then VENV=.venv-cpu; fi
export VENV=${VENV:-.venv}
scripts/setup.sh --cpu

# The manifest is written last: half a data set of an interrupted run is made again.
if [[ ! -f data/tiny_world/manifest.json ]]; then
  say "making the tiny world's data"
  "$VENV/bin/python" -m data_prep.tiny_world --out data/tiny_world
fi

output=$(mktemp)
trap 'rm -f "$output"' EXIT
say "training: python -m recipe.train method=sc_sdpo model=tiny data=tiny_world hardware=cpu $*"
status=0
"$VENV/bin/python" -m recipe.train method=sc_sdpo model=tiny data=tiny_world hardware=cpu "$@" | tee "$output" || status=${PIPESTATUS[0]}
((status == 0)) || { say "the run failed (exit status $status)" && exit "$status"; }

# The run's last line is one JSON object; `report` names the page.
"$VENV/bin/python" - "$output" <<'EOF'
import json
import pathlib
import sys

lines = pathlib.Path(sys.argv[1]).read_text(errors="replace").splitlines()
summary = json.loads(next(line for line in reversed(lines) if line.strip()))
print(f"[quickstart] {summary['metric']}: {summary['before']} before, {summary['after']} after {summary['steps']} steps")
print(f"[quickstart] the report: {pathlib.Path(summary['report']).resolve()}")
EOF
