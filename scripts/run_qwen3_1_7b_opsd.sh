#!/usr/bin/env bash
# OPSD (arXiv 2601.18734), later settings, on Qwen3-1.7B with LoRA as published: conf/method/opsd.yaml, docs/lora.md.
# Data first:
#   python -m data_prep.openthoughts_math --out data/openthoughts_math
#   for name in aime24 aime25 hmmt; do python -m data_prep.$name --prompt opsd --out data/${name}_opsd; done
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NODES=${NODES:-1}
GPUS=${GPUS:-8}                               # of a node
DATA=${DATA:-openthoughts_math}
OUTPUT=${OUTPUT:-outputs/qwen3_1_7b_opsd}
EXTRA=${EXTRA:-}                              # overrides, words without quotes; what needs quotes goes behind the command
read -r -a extra <<<"$EXTRA"

exec python -m recipe.train method=opsd adapter=lora model=qwen3_1_7b data="$DATA" hardware=gpu \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" run.output_dir="$OUTPUT" "${extra[@]}" "$@"
