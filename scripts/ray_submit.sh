#!/usr/bin/env bash
# One run on a Ray cluster that is there already. `scripts/ray_submit.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'END'
Usage: [NAME=VALUE…] scripts/ray_submit.sh [KEY=VALUE…] [--help]

Hands a run to a running Ray cluster with `ray job submit` and follows its output. The exit code says whether it succeeded.

  ADDRESS         the cluster's dashboard (RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)
  REPO            the checkout, on a path that every node sees (this one)
  VENV            virtual environment on every node, absolute or in REPO (none: python as the cluster has it)
  NODES           nodes to use (1)
  GPUS_PER_NODE   devices of a node (8)
  RUN_COMMAND     words without quotes (python -m recipe.train hardware=gpu)
  OUTPUT          run.output_dir, on a path that every node sees (outputs/ray-DATE-TIME in REPO); the same one resumes
  SUBMIT_ARGS     more arguments for `ray job submit`, words without quotes (for example --no-wait)
END
}

case ${1:-} in -h | --help) usage && exit 0 ;; esac

ADDRESS=${ADDRESS:-${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}}
REPO=${REPO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)}
VENV=${VENV:-}
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
RUN_COMMAND=${RUN_COMMAND:-python -m recipe.train hardware=gpu}
OUTPUT=${OUTPUT:-outputs/ray-$(date +%Y%m%d-%H%M%S)}
SUBMIT_ARGS=${SUBMIT_ARGS:-}

[[ $OUTPUT == /* ]] || OUTPUT=$REPO/$OUTPUT
[[ -z $VENV || $VENV == /* ]] || VENV=$REPO/$VENV
read -r -a command <<<"$RUN_COMMAND"
read -r -a more <<<"$SUBMIT_ARGS"

# The project is on every node: nothing is uploaded, and Ray sets RAY_ADDRESS for the driver.
# shellcheck disable=SC2016  # expanded on the cluster
start='cd "$1" && PATH="${2:+$2/bin:}$PATH" && shift 2 && exec "$@"'
exec ray job submit --address "$ADDRESS" "${more[@]}" -- bash -c "$start" launch "$REPO" "$VENV" \
  "${command[@]}" trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS_PER_NODE" run.output_dir="$OUTPUT" "$@"
