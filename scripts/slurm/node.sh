#!/usr/bin/env bash
# One node of one run: Ray's head with the driver, or a worker. `scripts/slurm/node.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/slurm/node.sh [KEY=VALUE…] [--help]

Runs on every node of a run, started by scripts/slurm/train.sbatch or by anything else that can start a process on a node
(nothing here needs Slurm). Rank 0 starts Ray, waits until all nodes and GPUs are there, runs RUN_COMMAND with the arguments
given and RAY_ADDRESS set, and ends with its exit code. The other ranks join, and leave when rank 0 has ended.

Needed, from the environment:
  HEAD_ADDRESS     address of rank 0 that every node reaches
  PORT             free port there for Ray
  NODE_RANK        0 to NODES - 1; 0 is the head
  LOG_DIR          folder that every node sees, a new one for every start

Optional:
  NODES            number of nodes (1)
  GPUS_PER_NODE    GPUs that every node must have (8); Ray finds them itself
  CPUS_PER_NODE    logical CPUs of a node in Ray (64)
  RUN_COMMAND      what rank 0 runs, words without quotes (python -m recipe.train)
  JOIN_TIMEOUT     seconds until all nodes must be there (600)
  POLL_SECONDS     pause between two looks (3)
  LOGICAL_GPUS     1: tell Ray about GPUS_PER_NODE that it cannot find (CPU runs)
  NODE_ADDRESS     this node's own address, where Ray would pick another one
  TEMP_DIR         Ray's own folder, local to the node and with a short path (/tmp/ray-UID)
  RAY_START_ARGS   more arguments for `ray start`, words without quotes
  VENV             virtual environment to put first in PATH
  RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH   Ray's own; default: a token of this start, in LOG_DIR
  RAY_health_check_*   Ray's own; default: a lost node is noticed after about 12 s

In LOG_DIR: node_RANK.log; `signal`, into which a signal's name is written to have it sent to the driver; `ended`, from rank 0.
SIGTERM and SIGUSR1 to rank 0 are passed to the driver as well.
END
}

case ${1:-} in -h | --help) usage && exit 0 ;; esac

: "${HEAD_ADDRESS:?see scripts/slurm/node.sh --help}" "${PORT:?}" "${NODE_RANK:?}" "${LOG_DIR:?}"
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_NODE=${CPUS_PER_NODE:-64}
RUN_COMMAND=${RUN_COMMAND:-python -m recipe.train}
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}
POLL_SECONDS=${POLL_SECONDS:-3}
LOGICAL_GPUS=${LOGICAL_GPUS:-0}
NODE_ADDRESS=${NODE_ADDRESS:-}
TEMP_DIR=${TEMP_DIR:-/tmp/ray-$(id -u)}
RAY_START_ARGS=${RAY_START_ARGS:-}
VENV=${VENV:-}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$repo"
[[ -z $VENV ]] || PATH=$(cd "$VENV" && pwd -P)/bin:$PATH
# Ray's workers inherit this from Ray: they take the code that the driver takes, also where an image has its own copy.
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
# Without a token of its own a head takes one that an earlier run left in the home folder, and joiners are refused.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$LOG_DIR/ray_token}
# A node that is gone is noticed after about 12 s in place of a minute. RUN_COMMAND's supervisor asks for it.
export RAY_health_check_initial_delay_ms=${RAY_health_check_initial_delay_ms:-5000}
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-1000}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-3000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-3}
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
# Told to end, Ray would wait half a minute for requests that nobody makes any more; without a head always.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}

mkdir -p "$LOG_DIR"
log=$LOG_DIR/node_$NODE_RANK.log
ended=$LOG_DIR/ended
deadline=$((SECONDS + JOIN_TIMEOUT))
# In the environment of Ray and of whatever it starts: no other start has the same.
mark=PASSRATE_NODE=$NODE_RANK:$LOG_DIR
readonly HEAD_STARTS=3 SECONDS_TO_LEAVE=5
driver='' ray='' watcher='' signalled=0 status=0

say() { printf '[node %s] %s\n' "$NODE_RANK" "$*" | tee -a "$log"; }
die() {
  printf '[node %s] error: %s\n' "$NODE_RANK" "$@" | tee -a "$log" >&2
  exit 1
}

# ---------------------------------------------------------------- processes
# start_ray ARGUMENT…: in the background, and ended with its own children by a SIGTERM. `ray stop` would also end the Ray of
# other jobs on this node.
start_ray() {
  local arguments=("$@" --num-cpus="$CPUS_PER_NODE" --temp-dir="$TEMP_DIR" --disable-usage-stats --block) more
  ((LOGICAL_GPUS == 0)) || arguments+=(--num-gpus="$GPUS_PER_NODE")
  read -r -a more <<<"$RAY_START_ARGS"
  # A session of its own, by which those are found that write their title over their environment.
  setsid env "$mark" ray start "${arguments[@]}" "${more[@]}" >>"$log" 2>&1 &
  ray=$!
}

running() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

left_of_ray() {
  {
    # Some end while they are read.
    grep -lzxF -- "$mark" /proc/[0-9]*/environ | tr -cd '0-9\n' || true
    { cat /proc/[0-9]*/stat || true; } | awk -v session="$ray" '{ pid = $1; sub(/.*\) /, "") } $4 == session && $1 != "Z" { print pid }'
  } 2>/dev/null | sort -un
}

# What a raylet that was killed leaves behind lives on for half a minute or for ever, and its devices with it.
end_what_is_left() {
  local left waited=0
  while mapfile -t left < <(left_of_ray) && ((${#left[@]})); do
    if ((waited++ >= SECONDS_TO_LEAVE)); then
      say "ended what Ray left behind: ${left[*]}"
      kill -KILL "${left[@]}" 2>/dev/null || true
      return
    fi
    sleep 1
  done
}

# shellcheck disable=SC2317  # called by trap
finish() {
  trap '' TERM USR1 INT
  local waited=0
  ! running "$watcher" || kill "$watcher" || true
  # Only a driver that is still there: the shell was told to end before it.
  ! running "$driver" || kill "$driver" || true
  ((NODE_RANK != 0)) || : >"$ended"
  if running "$ray"; then
    kill "$ray" || true
    while running "$ray" && ((waited++ < 30)); do sleep 1; done
    ! running "$ray" || kill -KILL "$ray" || true
  fi
  end_what_is_left
}
trap finish EXIT
trap 'exit 143' TERM INT
# Ray inherits that: Slurm may send the signal to every process of a step.
trap '' USR1

# shellcheck disable=SC2317  # called by trap
forward() {
  signalled=1
  say "SIG$1: passed to the driver"
  kill -s "$1" "$driver" 2>/dev/null || true
}

# A signal that is trapped ends `wait` early; the driver's own status comes with the next one.
await_driver() {
  while :; do
    signalled=0 status=0
    wait "$driver" || status=$?
    ((signalled)) || break
  done
}

# By a file, not through srun: with some process trackers a signal to a step reaches every process in it, Ray's too.
watch_signal_file() {
  local name
  while sleep 1; do
    [[ -s $LOG_DIR/signal ]] || continue
    name=$(<"$LOG_DIR/signal")
    rm -f "$LOG_DIR/signal"
    say "SIG$name: passed to the driver"
    kill -s "$name" "$driver" 2>/dev/null || true
  done
}

# ---------------------------------------------------------------- rank 0
# count_nodes: `ray status` on standard input to "NODES GPUS". Idle nodes have a heading of their own in newer versions.
count_nodes() {
  awk '
    /^(Active|Idle):/ { listed = 1; next }
    /^[^ ]/ { listed = 0 }
    listed && $1 ~ /^[0-9]+$/ { nodes += $1 }
    $2 == "GPU" && split($1, part, "/") == 2 { gpus = part[2] }
    END { printf "%d %d\n", nodes, gpus }'
}

# What is known of the nodes that are not there: one line for each rank.
missing_ranks() {
  local rank file
  for ((rank = 1; rank < NODES; rank++)); do
    file=$LOG_DIR/node_$rank.log
    if [[ ! -e $file ]]; then
      printf 'rank %s: nothing was started there (no %s)\n' "$rank" "$file"
    else
      printf 'rank %s: %s\n' "$rank" "$(grep -v '^[[:space:]]*$' "$file" | tail -n 1)"
    fi
  done
}

start_head() { start_ray --head --node-ip-address="$HEAD_ADDRESS" --port="$PORT" --include-dashboard=false; }

await_cluster() {
  local nodes=0 gpus=0 shown='' wanted=$((NODES * GPUS_PER_NODE)) lines starts=1
  while :; do
    if ! running "$ray"; then
      # Ray gives itself 30 s, which a loaded node or a slow file system may exceed once.
      ((starts++ < HEAD_STARTS)) ||
        die "Ray's head did not start, or ended, $HEAD_STARTS times: the last lines of $log say why"
      say "Ray's head is not running: once more"
      end_what_is_left
      start_head
    fi
    read -r nodes gpus < <({ timeout 60 ray status --address "$HEAD_ADDRESS:$PORT" 2>/dev/null || true; } | count_nodes)
    if [[ $shown != "$nodes $gpus" ]]; then
      say "Ray has $nodes of $NODES nodes and $gpus of $wanted GPUs"
      shown="$nodes $gpus"
    fi
    ((nodes < NODES || gpus < wanted)) || return 0
    if ((SECONDS >= deadline)); then
      mapfile -t lines < <(missing_ranks)
      die "after $JOIN_TIMEOUT s (JOIN_TIMEOUT) $((nodes < NODES ? NODES - nodes : 0)) of $NODES nodes and \
$((gpus < wanted ? wanted - gpus : 0)) of $wanted GPUs are missing (GPUS_PER_NODE=$GPUS_PER_NODE)" "${lines[@]}"
    fi
    sleep "$POLL_SECONDS"
  done
}

make_token() {
  [[ $RAY_AUTH_MODE == token && ! -s $RAY_AUTH_TOKEN_PATH ]] || return 0
  # Moved into place whole: workers wait for the file.
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH.new")
  mv "$RAY_AUTH_TOKEN_PATH.new" "$RAY_AUTH_TOKEN_PATH"
}

run_head() {
  local command
  if [[ -e $ended ]]; then
    trap - EXIT
    die "$LOG_DIR was used before: workers would leave at once; take a new folder"
  fi
  make_token
  say "Ray's head on $(hostname), $HEAD_ADDRESS:$PORT"
  start_head
  await_cluster
  read -r -a command <<<"$RUN_COMMAND"
  say "driver: ${command[*]} $*"
  # A driver must not inherit it.
  trap - USR1
  RAY_ADDRESS=$HEAD_ADDRESS:$PORT "${command[@]}" "$@" &
  driver=$!
  trap 'forward USR1' USR1
  trap 'forward TERM' TERM INT
  watch_signal_file &
  watcher=$!
  await_driver
  say "the driver ended with $status"
  exit "$status"
}

# ---------------------------------------------------------------- the other ranks
run_worker() {
  while [[ $RAY_AUTH_MODE == token && ! -s $RAY_AUTH_TOKEN_PATH ]]; do
    ((SECONDS < deadline)) || die "$(hostname): rank 0 wrote no $RAY_AUTH_TOKEN_PATH within $JOIN_TIMEOUT s (JOIN_TIMEOUT)"
    sleep 1
  done
  local own=()
  [[ -z $NODE_ADDRESS ]] || own=(--node-ip-address="$NODE_ADDRESS")
  while :; do
    say "$(hostname) joins $HEAD_ADDRESS:$PORT"
    start_ray --address="$HEAD_ADDRESS:$PORT" "${own[@]}"
    while running "$ray" && [[ ! -e $ended ]]; do sleep 1; done
    if [[ -e $ended ]]; then
      say "rank 0 has ended"
      exit 0
    fi
    ((SECONDS < deadline)) ||
      die "$(hostname): Ray is not running here: it could not join $HEAD_ADDRESS:$PORT within $JOIN_TIMEOUT s (JOIN_TIMEOUT), or ended later"
    say "Ray is not running here: once more"
    end_what_is_left
    sleep "$POLL_SECONDS"
  done
}

if ((NODE_RANK == 0)); then run_head "$@"; else run_worker; fi
