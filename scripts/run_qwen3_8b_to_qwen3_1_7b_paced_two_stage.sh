#!/usr/bin/env bash
# PACED (arXiv 2603.11178) in two stages: Qwen3-8B after GRPO teaches Qwen3-1.7B. docs/paced.md explains the steps before this one:
#   python -m data_prep.dapo_math --out data/dapo_math
#   for name in math500 aime24 aime25; do python -m data_prep.$name --prompt paced --out data/${name}_paced; done
#   python -m recipe.train method=paced_teacher model=qwen3_8b data=dapo_math hardware=gpu run.steps=266 run.save_every=133 \
#     run.output_dir=outputs/teacher 'actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]'
#   python -m recipe.pass_rates model=qwen3_1_7b data=dapo_math hardware=gpu sample.out=outputs/rates sample.max_tokens=8192
#   python -m recipe.teacher_text model=qwen3_1_7b data=dapo_math hardware=gpu sample.out=outputs/teacher_samples \
#     sample.checkpoint=outputs/teacher/checkpoints/global_step_266 text.out=data/dapo_math_teacher_text
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NODES=${NODES:-1}
GPUS=${GPUS:-8}                               # of a node
DATA=${DATA:-dapo_math}
TEACHER=${TEACHER:-outputs/teacher/checkpoints/global_step_266/actor/huggingface}
TEXT=${TEXT:-data/dapo_math_teacher_text/train.parquet} # the teacher's text, verified
RATES=${RATES:-outputs/rates}                 # the student's pass rates
OUTPUT=${OUTPUT:-outputs/qwen3_8b_to_qwen3_1_7b_paced_two_stage}
EXTRA=${EXTRA:-}                              # overrides, words without quotes; what needs quotes goes behind the command
read -r -a extra <<<"$EXTRA"

exec python -m recipe.train method=paced_two_stage model=qwen3_1_7b data="$DATA" hardware=gpu \
  distill.teacher.path="$TEACHER" distill.weighting.store="$RATES" \
  data.train_files="$TEXT" distill.sequences.reference_key=teacher_text \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" run.output_dir="$OUTPUT" "${extra[@]}" "$@"
