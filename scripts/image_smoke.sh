#!/usr/bin/env bash
# The images' own test, and what they run by default. `scripts/image_smoke.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/image_smoke.sh [KEY=VALUE…] [--help]

Looks whether the installed stack loads, whether this project is found from another folder, by vLLM's processes too, and
whether the run that KEY=VALUE describes passes the offline doctor. Needs no GPU, no network and no model; a minute at most.
END
}

case ${1:-} in -h | --help) usage && exit 0 ;; esac

# Elsewhere than in the checkout, and without its path: what is found then is found by every worker.
cd /
unset PYTHONPATH
python - <<'END'
from importlib.metadata import entry_points, version

import ray
import torch
import verl
import vllm

import recipe
import verl_ext

# As vLLM does it in each of its processes, less the call.
plugins = [point.load() for point in entry_points(group="vllm.general_plugins") if point.name == "verl_ext"]
if not plugins:
    raise SystemExit("error: no installed distribution brings vLLM's plugin verl_ext: pip install --no-deps -e . in the checkout")
print("torch", torch.__version__, "· verl", verl.__version__, "· vllm", vllm.__version__, "· ray", ray.__version__)
print("transformers", version("transformers"), "·", recipe.__file__, "·", verl_ext.__file__)
print("CUDA devices:", torch.cuda.device_count())
END
python -m recipe.doctor --offline "$@"
echo "[image] the stack loads"
