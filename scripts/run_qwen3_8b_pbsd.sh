#!/usr/bin/env bash
# PBSD (arXiv 2605.05040) on Qwen3-8B with LoRA; its teacher is the model without the adapter: docs/pbsd.md.
# Data first:
#   python -m data_prep.openthoughts_math --out data/openthoughts_math
#   for name in aime24 aime25 hmmt; do python -m data_prep.$name --prompt opsd --out data/${name}_opsd; done
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NODES=${NODES:-1}
GPUS=${GPUS:-8}                               # of a node
DATA=${DATA:-openthoughts_math}
OUTPUT=${OUTPUT:-outputs/qwen3_8b_pbsd}
EXTRA=${EXTRA:-}                              # overrides, words without quotes; what needs quotes goes behind the command
read -r -a extra <<<"$EXTRA"

exec python -m recipe.train method=pbsd adapter=lora teacher=frozen model=qwen3_8b data="$DATA" hardware=gpu \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" run.output_dir="$OUTPUT" "${extra[@]}" "$@"
