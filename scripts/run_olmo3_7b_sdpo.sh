#!/usr/bin/env bash
# SDPO (arXiv 2601.20802), generalisation runs, on Olmo-3-7B-Instruct.
# Data first: python -m data_prep.sciknoweval --out data/sciknoweval
# (other domains: DATA=sciknoweval_biology, sciknoweval_material, sciknoweval_physics; tool use: DATA=tooluse).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NODES=${NODES:-1}
GPUS=${GPUS:-8}                               # of a node
DATA=${DATA:-sciknoweval_chemistry}
OUTPUT=${OUTPUT:-outputs/olmo3_7b_sdpo}
EXTRA=${EXTRA:-}                              # overrides, words without quotes; what needs quotes goes behind the command
read -r -a extra <<<"$EXTRA"

exec python -m recipe.train method=sdpo model=olmo3_7b data="$DATA" hardware=gpu \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" run.output_dir="$OUTPUT" "${extra[@]}" "$@"
