#!/usr/bin/env bash
# Set-up, then style check and tests. `scripts/test.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: scripts/test.sh [TIER…] [--cpu | --cuda] [--help] [-- PYTEST ARGUMENT…]

Sets the environment up (scripts/setup.sh), checks the style with ruff and runs the tests. Ends with one line of totals;
the exit status is 0 only if everything passed. A tier without any test counts as a failure.

Tiers (default: all of them, in this order):
  unit       formulas, data and settings; no Ray
  contract   what we rely on in verl, and every preset
  e2e        the real stack: Ray, vLLM, FSDP, TransferQueue; minutes

Arguments after the tiers go to pytest: scripts/test.sh unit -k weighting -x
EOF
}

say() { printf '[test] %s\n' "$*"; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."

tiers=() setup_args=() pytest_args=()
while (($#)); do
  case $1 in
    unit | contract | e2e) tiers+=("$1") ;;
    all) tiers+=(unit contract e2e) ;;
    --cpu | --cuda) setup_args+=("$1") ;;
    -h | --help) usage && exit 0 ;;
    --)
      shift
      pytest_args=("$@")
      break
      ;;
    *)
      pytest_args=("$@")
      break
      ;;
  esac
  shift
done
((${#tiers[@]})) || tiers=(unit contract e2e)

scripts/setup.sh "${setup_args[@]+"${setup_args[@]}"}"
VENV=${VENV:-.venv}
started=$SECONDS
failed=()
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

say "ruff check"
"$VENV/bin/python" -m ruff check . || failed+=(ruff)

# No account, no download, no telemetry in tests.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=disabled RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

for tier in "${tiers[@]}"; do
  say "$tier tests"
  tier_env=()
  tier_args=()
  # Without Ray the tests share nothing: two processes, whole files each, so that fixtures of a file are made once, and
  # the files in the order of tests/conftest.py (xdist's own begins with those of most tests, long or not). Small tensors
  # gain nothing from many threads. The e2e tier leaves their number to Ray and vLLM.
  [[ $tier == e2e ]] || tier_env=(OMP_NUM_THREADS=1 MKL_NUM_THREADS=1) tier_args=(-n 2 --dist loadfile --no-loadscope-reorder)
  status=0
  env "${tier_env[@]+"${tier_env[@]}"}" "$VENV/bin/python" -m pytest "tests/$tier" --durations=10 \
    "${tier_args[@]+"${tier_args[@]}"}" "${pytest_args[@]+"${pytest_args[@]}"}" 2>&1 | tee "$logs/$tier" || status=${PIPESTATUS[0]}
  case $status in
    0) ;;
    4 | 5)
      say "no tests were found in the $tier tier"
      failed+=("$tier")
      ;;
    *) failed+=("$tier") ;;
  esac
done

# The tiers run in processes of their own; this adds up their closing lines into one of the same form.
"$VENV/bin/python" - $((SECONDS - started)) "$logs"/* <<'EOF'
import collections
import pathlib
import re
import sys

totals = collections.Counter()
for path in sys.argv[2:]:
    lines = re.findall(r"^(?:=+ )?(.*\b\d+ \w+.*) in [\d.]+s\b.*$", pathlib.Path(path).read_text(errors="replace"), re.M)
    for number, word in re.findall(r"(\d+) (failed|passed|skipped|deselected|xfailed|xpassed|warnings?|errors?)", lines[-1] if lines else ""):
        totals["errors" if word == "error" else "warnings" if word == "warning" else word] += int(number)
order = ["failed", "errors", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings"]
text = ", ".join(f"{totals[word]} {word}" for word in order if totals[word] or word == "passed")
print(f"{f' {text} in {float(sys.argv[1]):.2f}s ':=^100}")
EOF
if ((${#failed[@]})); then
  say "FAILED: ${failed[*]}"
  exit 1
fi
say "passed: ruff ${tiers[*]}"
