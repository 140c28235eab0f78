#!/usr/bin/env bash
# Makes the virtual environment from the locked requirement files. `scripts/setup.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: scripts/setup.sh [--cpu | --cuda] [--force] [--help]

Makes .venv and installs the locked stack into it: the CUDA one where an NVIDIA GPU is found, else the CPU one.
Running it again does nothing while the lock is unchanged; an interrupted or damaged installation is made anew.

  --cpu, --cuda   take this stack instead of the detected one
  --force         install what is missing and check every file, even if nothing seems to have changed
  --help          show this text

Environment:
  PYTHON                    the interpreter to build on (Python 3.11; default: python3.11, else python3)
  VENV                      where to make the environment (default: .venv in the repository)
  FLASH_ATTN_WHEEL          CUDA only: path or address of a prebuilt flash-attn wheel
  SETUP_CUDA_WITHOUT_GPU=1  allow --cuda on a machine without a GPU (login nodes, image builds)

pip's own configuration (indexes, proxies, certificates) is used as it is.
EOF
}

say() { printf '[setup] %s\n' "$*"; }
die() {
  printf '[setup] error: %s\n' "$1" >&2
  shift
  for line in "$@"; do printf '[setup]        %s\n' "$line" >&2; done
  exit 1
}

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$REPO"

variant='' force=0
for arg in "$@"; do
  case $arg in
    --cpu | --cuda)
      [[ -z $variant || $variant == "${arg#--}" ]] || die "--cpu and --cuda exclude each other"
      variant=${arg#--}
      ;;
    --force) force=1 ;;
    -h | --help) usage && exit 0 ;;
    *) die "unknown argument '$arg'" "see scripts/setup.sh --help" ;;
  esac
done

# ---------------------------------------------------------------- which stack
has_gpu() { [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }; }

if has_gpu; then found='an NVIDIA GPU was found'; else found='no NVIDIA GPU was found'; fi
if [[ -n $variant ]]; then
  why="asked for; $found"
else
  if has_gpu; then variant=cuda; else variant=cpu; fi
  why=$found
fi
if [[ $variant == cuda && ${SETUP_CUDA_WITHOUT_GPU:-0} != 1 ]] && ! has_gpu; then
  die "--cuda, but no NVIDIA GPU was found (no /dev/nvidia0, and nvidia-smi lists none)" \
    "Take --cpu, or set SETUP_CUDA_WITHOUT_GPU=1 where the environment is meant for another machine."
fi
lock=requirements/$variant.txt
VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$REPO/$VENV
stamp=$VENV/.setup-stamp
incomplete=$VENV/.setup-incomplete
log=$VENV/setup.log

# One set-up at a time: a second one waits here and then finds nothing to do.
exec 9<"${BASH_SOURCE[0]}"
if command -v flock >/dev/null && ! flock -n 9; then
  say "another set-up of this checkout is running: waiting for it"
  flock 9
fi

# ---------------------------------------------------------------- nothing to do?
# The environment's path is part of the digest: scripts in it name the interpreter absolutely, so a moved one is broken.
digest=$({ cat "$lock" pyproject.toml scripts/setup.sh && printf '%s %s\n' "$variant" "$VENV"; } | sha256sum | cut -d' ' -f1)
flash_attn_wanted() {
  [[ $variant == cuda ]] && ! compgen -G "$VENV/lib/python3.*/site-packages/flash_attn-*.dist-info" >/dev/null
}

if [[ -f $stamp && $(sed -n 's/^variant=//p' "$stamp") != "$variant" ]]; then
  die "$VENV holds the $(sed -n 's/^variant=//p' "$stamp") stack, and the $variant stack is wanted ($why)" \
    "Keep both with VENV=.venv-$variant scripts/setup.sh --$variant, or remove $VENV first."
fi
current=0
if [[ $force == 0 && ! -e $incomplete && -x $VENV/bin/python && -f $stamp && $(sed -n 's/^digest=//p' "$stamp") == "$digest" ]]; then
  current=1
  if ! flash_attn_wanted || [[ -z ${FLASH_ATTN_WHEEL:-} ]]; then
    say "$VENV is up to date ($variant stack; $why)."
    exit 0
  fi
fi

# ---------------------------------------------------------------- can it work on this machine?
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
docker_hint="Elsewhere use the CPU stage of the Dockerfile: docker build --target cpu -t passrate-distill:cpu ."
[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
  die "supported is Linux on x86-64, this is $(uname -s) on $(uname -m)" "$docker_hint"
[[ -n $python ]] || die "no Python was found" "Install Python 3.11 or set PYTHON=/path/to/python3.11." "$docker_hint"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  die "PYTHON=$python does not run" "Set PYTHON to a Python 3.11 interpreter."
[[ $version == 3.11 ]] ||
  die "the locked wheels are for Python 3.11; $python is Python $version" \
    "Set PYTHON=/path/to/python3.11." "$docker_hint"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python has no venv module" "Install it (Debian and Ubuntu: the package python3.11-venv)."
"$python" - <<'EOF' || die "the locked wheels need glibc 2.31 or later" "$docker_hint"
import os, sys
name, _, number = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")
sys.exit(not (name == "glibc" and tuple(map(int, number.split(".")[:2])) >= (2, 31)))
EOF
if [[ $variant == cpu ]]; then
  "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    die "vLLM's CPU build needs the system library libnuma.so.1" "Install it (Debian and Ubuntu: the package libnuma1)."
  command -v g++ >/dev/null || say "note: no g++ here; code that uses torch.compile on CPU needs one (Debian and Ubuntu: the package g++)."
fi

# An installed environment needs little room for repairs.
if [[ $variant == cuda ]]; then need_gb=25; else need_gb=6; fi
[[ ! -f $stamp ]] || need_gb=2
where=$VENV
while [[ ! -d $where ]]; do where=$(dirname "$where"); done
free_kb=$(df -Pk "$where" | awk 'NR == 2 {print $4}')
((free_kb >= need_gb * 1024 * 1024)) ||
  die "$((free_kb / 1024 / 1024)) GB free at $where, but the $variant stack needs $need_gb GB" "Free some, or set VENV to a folder on another disk."

# ---------------------------------------------------------------- how steps are run and shown
started=$SECONDS
work=$(mktemp -d)
job=''
# shellcheck disable=SC2317  # called by trap
stop() {
  if [[ -n $job ]]; then
    kill "$job" 2>/dev/null || true
    wait "$job" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

# What went wrong, in words; pip's last lines are shown as well.
explain() {
  sed 's/^/[setup]   | /' <(tail -n 12 "$log") >&2
  if grep -qiE 'No space left' "$log"; then
    die "the disk is full" "Free some space and run scripts/setup.sh again."
  elif grep -qE 'DO NOT MATCH THE HASHES' "$log"; then
    die "a downloaded file is not the locked one" "Look for the package above; an index that serves rebuilt files cannot be used with this lock."
  elif grep -qiE 'NewConnectionError|NameResolutionError|Name or service not known|Temporary failure in name|Connection (refused|reset)|timed out|ProxyError|SSLError' "$log"; then
    die "the package index could not be reached" "Check the network, and pip's configuration (pip config list)." "Then run scripts/setup.sh again: what was downloaded is kept by pip."
  fi
  die "$1 failed" "The whole log is $log. Run scripts/setup.sh again once the cause is removed."
}

# step TITLE COMMAND…: runs it with a sign of life, says how long it took; returns the command's status. Where TITLE
# begins with a number of packages, the time left is estimated from those that are fetched.
step() {
  local title=$1 begin=$SECONDS status=0 shown=0 state total=0
  [[ ! $title =~ ^([0-9]+)\  ]] || total=${BASH_REMATCH[1]}
  shift
  : >"$log"
  "$@" >>"$log" 2>&1 &
  job=$!
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.5
    if ((SECONDS - begin - shown >= 15)); then
      shown=$((SECONDS - begin))
      state=$(grep -c '^Collecting ' "$log" || true)
      if ((state == 0)); then
        state=''
      elif grep -q '^Installing collected' "$log"; then
        state=', unpacking'
      elif ((total > state)); then
        state=", $state of $total packages fetched, about $((shown * (total - state) / state)) s of fetching left"
      else
        state=", $state packages fetched"
      fi
      say "  … $title: $shown s$state"
    fi
  done
  wait "$job" || status=$?
  job=''
  [[ $status != 0 ]] || say "$title: $((SECONDS - begin)) s"
  return "$status"
}

# part NAME…: the lock lines of these packages (and pip's options) alone; with "!" first, all the others.
part() {
  awk -v names=" $* " '
    /^#/ || /^$/ { next }
    /^--/ { print; next }
    /^[A-Za-z0-9]/ { split($1, p, "=="); keep = (index(names, " " p[1] " ") > 0); if (index(names, " ! ")) keep = !keep }
    keep' "$lock"
}

# exec: a stopped set-up then stops pip itself.
pip_install() {
  exec "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-deps --no-compile \
    --no-build-isolation "$@"
}

# Every locked distribution is there in that version with all its files; torch is the right build; `recipe` is ours.
cat >"$work/check.py" <<'EOF'
import importlib.metadata
import os
import re
import sys

from packaging.version import Version

lock, repo = sys.argv[1:]
wanted = re.findall(r"^([A-Za-z0-9._-]+)==([^ \\\n]+)", open(lock).read(), re.M)
problems = []
for name, version in wanted:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"{name} is missing")
        continue
    if Version(found.version) != Version(version):
        problems.append(f"{name} is {found.version}, locked is {version}")
    missing = [f for f in found.files or [] if f.suffix != ".pyc" and not os.path.exists(found.locate_file(f))]
    if missing:
        problems.append(f"{name} lacks {len(missing)} of its files, among them {missing[0]}")
os.chdir("/")
sys.path = [p for p in sys.path if p not in ("", repo)] + [repo] * (repo in sys.path)
import recipe  # noqa: E402
import torch  # noqa: E402

if (getattr(recipe, "__file__", None) or "") != os.path.join(repo, "recipe", "__init__.py"):
    problems.append(f"`import recipe` gives {recipe!r}, not the folder of this checkout")
if torch.__version__.split("+cu")[0] != dict(wanted)["torch"]:  # the CUDA build adds +cu130, which its lock does not name
    problems.append(f"torch is {torch.__version__}")
for problem in problems:
    print(problem)
if problems:
    sys.exit("The environment is not what the lock says.")
EOF

# ---------------------------------------------------------------- install
if [[ $current == 0 ]]; then
  say "$variant stack ($why), $("$python" --version) at $python, into $VENV"
  fresh=0
  if [[ -e $incomplete ]]; then
    say "the last set-up did not finish: starting afresh (pip keeps what was downloaded)"
    fresh=1
  elif [[ ! -x $VENV/bin/python ]] || ! grep -qxF "$VENV" <("$VENV/bin/python" -c 'import sys; print(sys.prefix)' 2>/dev/null); then
    # Also where the folder was copied or its interpreter is gone.
    fresh=1
  fi
  if [[ $fresh == 1 ]]; then "$python" -m venv --clear "$VENV"; fi
  touch "$incomplete"

  build=(pip setuptools wheel)
  part "${build[@]}" >"$work/build.txt"
  part torch >"$work/torch.txt"
  part ! torch "${build[@]}" >"$work/rest.txt"
  count=$(grep -c '==' "$work/rest.txt")

  step "pip and build tools" pip_install --require-hashes -r "$work/build.txt" || explain "installing pip"

  if ! step "torch" pip_install --require-hashes -r "$work/torch.txt"; then
    if [[ $variant == cpu ]] && grep -q 'No matching distribution found' "$log"; then
      say "pip's configured indexes do not have $(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$work/torch.txt"): adding PyTorch's CPU index, for torch alone"
      if ! step "torch" pip_install --require-hashes --extra-index-url https://download.pytorch.org/whl/cpu -r "$work/torch.txt"; then
        say "a folder that holds the wheel will do as well: PIP_FIND_LINKS=folder scripts/setup.sh"
        explain "installing torch"
      fi
    else
      explain "installing torch"
    fi
  fi
  step "$count more locked packages" pip_install --require-hashes -r "$work/rest.txt" || explain "installing the locked packages"
  # The path-file mode: TransferQueue installs a namespace folder `recipe`, which would otherwise shadow ours.
  step "this project" pip_install -e . --config-settings editable_mode=compat || explain "installing this project"
  # pip would compile on one core.
  step "byte code" "$VENV/bin/python" -c '
import compileall, sys
compileall.compile_dir(sys.argv[1], quiet=2, workers=0)' "$VENV/lib/python3.11/site-packages" || explain "compiling byte code"
  if ! step "check" "$VENV/bin/python" "$work/check.py" "$lock" "$REPO"; then
    [[ $fresh == 0 ]] || explain "checking the installation"
    sed 's/^/[setup]   | /' "$log"
    say "this environment is damaged: starting afresh"
    stop
    exec "$REPO/scripts/setup.sh" "--$variant"
  fi

  printf 'variant=%s\ndigest=%s\n' "$variant" "$digest" >"$stamp"
  rm -f "$incomplete"
fi

# ---------------------------------------------------------------- flash-attn, from a prebuilt wheel or not at all
if flash_attn_wanted; then
  if [[ -n ${FLASH_ATTN_WHEEL:-} ]]; then
    step "flash-attn" pip_install --only-binary :all: "$FLASH_ATTN_WHEEL" || explain "installing FLASH_ATTN_WHEEL=$FLASH_ATTN_WHEEL"
    "$VENV/bin/python" -c 'import flash_attn' || die "FLASH_ATTN_WHEEL=$FLASH_ATTN_WHEEL does not load: is it for torch 2.11, CUDA 13 and Python 3.11?"
  elif ! step "flash-attn" pip_install --only-binary :all: -r requirements/flash_attn.txt; then
    say "warning: $(tail -n 1 requirements/flash_attn.txt) is not installed: the configured indexes have no prebuilt wheel of it, and it is not compiled here."
    say "         Use the Docker image, or give a wheel for torch 2.11, CUDA 13 and Python 3.11: FLASH_ATTN_WHEEL=path scripts/setup.sh --cuda"
    say "         Presets that ask for flash attention will refuse to start until then."
  fi
fi

say "done in $((SECONDS - started)) s: $VENV ($variant stack). Next: scripts/quickstart.sh, or source $VENV/bin/activate"
