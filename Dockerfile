# syntax=docker/dockerfile:1
#
#   docker build --target cpu -t passrate-distill:cpu .
#   docker run --rm --shm-size=2g passrate-distill:cpu                          # does the stack load?
#   docker run --rm --shm-size=2g -v "$PWD/outputs:/app/outputs" passrate-distill:cpu scripts/quickstart.sh
#
#   docker build --target gpu --build-arg VERL_TAG=TAG --build-arg VERL_DIGEST=sha256:DIGEST -t passrate-distill:gpu .
#   docker run --rm --gpus all --shm-size=10g -v "$PWD/outputs:/app/outputs" passrate-distill:gpu scripts/gpu_smoke.sh
#
# Pin both bases by digest where builds must be repeatable; PYTHON_IMAGE=python:3.11-slim@sha256:… for the CPU stage.
ARG PYTHON_IMAGE=python:3.11-slim
# verl publishes images of its dependencies, not of its releases, so there is no tag that is 0.9.1's for certain and none
# is assumed here. docs/clusters.md says where to look; the stage checks what it gets.
ARG VERL_IMAGE=verlai/verl
ARG VERL_TAG
ARG VERL_DIGEST

# ---------------------------------------------------------------- CPU
FROM ${PYTHON_IMAGE} AS cpu

# libnuma1: vLLM's CPU build links to it; g++: torch.compile on CPU.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*

ARG USER_ID=1000
RUN useradd --create-home --uid "${USER_ID}" user \
 && mkdir -p /app/outputs /app/data \
 && chown -R user:user /app
# By its number: Kubernetes cannot tell that a name is not root's.
USER ${USER_ID}
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

# Replaced by whatever command is given to `docker run`.
CMD ["scripts/image_smoke.sh", "method=sc_sdpo", "model=tiny", "data=tiny_world", "hardware=cpu"]

# ---------------------------------------------------------------- GPU
# Which of the next two stages is meant follows from VERL_TAG: `verl-image-given`, or `verl-image-` where it is not set.
FROM ${PYTHON_IMAGE} AS verl-image-
USER 65534
RUN echo "error: name one of verl's published vLLM images for verl 0.9.1: --build-arg VERL_TAG=… --build-arg VERL_DIGEST=sha256:…" \
      "(docker/README.md and .github/workflows/vllm.yml of verl at v0.9.1 name them, hub.docker.com/r/verlai/verl/tags lists them;" \
      "more in docs/clusters.md)" >&2 \
 && exit 1

FROM ${VERL_IMAGE}:${VERL_TAG:-unset}${VERL_DIGEST:+@${VERL_DIGEST}} AS verl-image-given

# hadolint ignore=DL3006
FROM verl-image-${VERL_TAG:+given} AS gpu
USER 0

ARG USER_ID=1000
# Ubuntu's images have a user of that number.
RUN if taken=$(getent passwd "${USER_ID}"); then userdel --remove "${taken%%:*}"; fi \
 && useradd --create-home --uid "${USER_ID}" user \
 && mkdir -p /app/outputs /app/data \
 && chown -R user:user /app
USER ${USER_ID}
WORKDIR /app

# verl is not in its own images; nor are all locked versions. They go into an environment above the image's packages, of
# which none is touched.
COPY --chown=user:user pyproject.toml ./
COPY --chown=user:user requirements/ requirements/
COPY --chown=user:user recipe/__init__.py recipe/image_packages.py recipe/
RUN touch README.md \
 && mkdir verl_ext data_prep \
 && touch verl_ext/__init__.py data_prep/__init__.py \
 && python3 recipe/image_packages.py pip setuptools wheel >/tmp/build.txt \
 && python3 recipe/image_packages.py >/tmp/packages.txt \
 && python3 -m venv --without-pip --system-site-packages .venv \
 && .venv/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r /tmp/build.txt \
 && .venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation --require-hashes -r /tmp/packages.txt \
 && .venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation -e . --config-settings editable_mode=compat \
 && rm /tmp/build.txt /tmp/packages.txt

COPY --chown=user:user . .

ENV PATH=/app/.venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1

# The image's test is a step of its build, for which no GPU is needed, and what the image does by default.
RUN scripts/image_smoke.sh method=sc_sdpo model=qwen3_8b data=sciknoweval_chemistry hardware=gpu layout=gpus8
CMD ["scripts/image_smoke.sh", "method=sc_sdpo", "model=qwen3_8b", "data=sciknoweval_chemistry", "hardware=gpu", "layout=gpus8"]
