#!/usr/bin/env bash
# SD-Zero (arXiv 2604.12002) on Qwen3-4B-Instruct-2507: collect, fine-tune, distil, evaluate, one after the other: docs/sd_zero.md.
# Data first:
#   python -m data_prep.openr1_math --out data/openr1_math && python -m data_prep.aime24 --out data/aime24
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NODES=${NODES:-1}
GPUS=${GPUS:-8}                               # of a node
DATA=${DATA:-openr1_math}
OUTPUT=${OUTPUT:-outputs/qwen3_4b_instruct_sd_zero}
EXTRA=${EXTRA:-}                              # overrides, words without quotes; what needs quotes goes behind the command
read -r -a extra <<<"$EXTRA"

exec python -m recipe.train method=sd_zero model=qwen3_4b_instruct data="$DATA" hardware=gpu \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" run.output_dir="$OUTPUT" "${extra[@]}" "$@"
