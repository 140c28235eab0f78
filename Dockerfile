# syntax=docker/dockerfile:1
#
#   docker build --target cpu -t passrate-distill:cpu .
#   docker run --rm --shm-size=2g passrate-distill:cpu                          # does the stack load?
#   docker run --rm --shm-size=2g -v "$PWD/outputs:/app/outputs" passrate-distill:cpu scripts/quickstart.sh
#
# Pin the base by digest where builds must be repeatable: --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim

# ---------------------------------------------------------------- CPU
FROM ${PYTHON_IMAGE} AS cpu

# libnuma1: vLLM's CPU build links to it; g++: torch.compile on CPU.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN useradd --create-home --uid "${UID}" user \
 && mkdir -p /app/outputs /app/data \
 && chown -R user:user /app
USER user
WORKDIR /app

# The locked packages first, with stand-ins for our own: a change of our code does not install them again.
COPY --chown=user:user pyproject.toml ./
COPY --chown=user:user requirements/ requirements/
COPY --chown=user:user scripts/setup.sh scripts/
RUN touch README.md \
 && mkdir recipe verl_ext data_prep \
 && touch recipe/__init__.py verl_ext/__init__.py data_prep/__init__.py \
 && PYTHON=/usr/local/bin/python3.11 PIP_NO_CACHE_DIR=1 scripts/setup.sh --cpu

COPY --chown=user:user . .
# Nothing to do unless a lock has changed meanwhile; the project was installed as a path.
RUN scripts/setup.sh --cpu

ENV PATH=/app/.venv/bin:${PATH} \
    PYTHON=/usr/local/bin/python3.11 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1

# The stack loads, and our part is found from another folder. Replaced by whatever command is given to `docker run`.
CMD ["sh", "-c", "cd / && python -c \"import recipe, verl_ext, torch, ray, verl, vllm; print('torch', torch.__version__, '· verl', verl.__version__, '· vllm', vllm.__version__, '· ray', ray.__version__, '·', recipe.__file__)\""]

# ---------------------------------------------------------------- GPU
# A stage of its own follows here with its own issue; it starts from an image that has a prebuilt flash-attn.
