#!/usr/bin/env bash
# GRPO on Qwen3-8B, the baseline of the SDPO and SC-SDPO runs, with verl's settings. The baseline of SDPO's own repository is
# EXTRA=method=grpo_without_std.
# Data first: python -m data_prep.sciknoweval --out data/sciknoweval
# (other domains: DATA=sciknoweval_biology, sciknoweval_material, sciknoweval_physics; tool use: DATA=tooluse).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NODES=${NODES:-1}
GPUS=${GPUS:-8}                               # of a node
DATA=${DATA:-sciknoweval_chemistry}
OUTPUT=${OUTPUT:-outputs/qwen3_8b_grpo}
EXTRA=${EXTRA:-}                              # overrides, words without quotes; what needs quotes goes behind the command
read -r -a extra <<<"$EXTRA"

exec python -m recipe.train method=grpo model=qwen3_8b data="$DATA" hardware=gpu \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" run.output_dir="$OUTPUT" "${extra[@]}" "$@"
