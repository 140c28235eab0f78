#!/usr/bin/env bash
# First contact with a cluster: ten minutes on one GPU node. `scripts/gpu_smoke.sh --help` says how.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
# An image, or an environment that is active, has its own.
if [[ -x $VENV/bin/python ]]; then PATH=$(cd "$VENV" && pwd -P)/bin:$PATH; fi
if ! python -c 'import recipe, psutil, omegaconf' 2>/dev/null; then
  echo "error: no environment with the stack: run scripts/setup.sh first, set VENV, or use the image (docs/clusters.md)" >&2
  exit 2
fi
exec python -m recipe.smoke "$@"
