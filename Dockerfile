# CPU image: the set-up of `make serve`, in two stages; the second has neither compiler nor test tools.
#   docker build --build-arg PIP_EXTRA_INDEX_URL -t quest-vllm-cpu .
#   docker run --init --shm-size=1g -p 8000:8000 quest-vllm-cpu
# PIP_EXTRA_INDEX_URL, in your environment, names an index with torch's CPU builds (docs/get-started.md).
# Another model, any flag of `vllm serve`: docker run ... quest-vllm-cpu MODEL --host 0.0.0.0 [flags]
# The base is pinned by digest, Python packages by hash (docker/lock-cpu.txt; x86-64), Debian's packages by neither.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON_IMAGE} AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/quest_vllm
COPY . .
ARG PIP_EXTRA_INDEX_URL
ENV QUEST_VLLM_CACHE=/opt/quest_vllm/.cache/kernels PIP_NO_CACHE_DIR=1
# the kernels are built for every instruction set and chosen when the server starts, so any x86-64 machine can build
RUN make env kernels model LOCKED=1 \
    && .venv/bin/python -m pip uninstall --yes --requirement docker/not-in-image.txt

FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 quest
COPY --from=build --chown=quest:quest /opt/quest_vllm /opt/quest_vllm
USER 10001
WORKDIR /opt/quest_vllm
# vLLM-CPU would take 92% of the machine's memory for the KV cache: 2 GiB unless told otherwise
ENV PATH=/opt/quest_vllm/.venv/bin:$PATH QUEST_VLLM_CACHE=/opt/quest_vllm/.cache/kernels \
    VLLM_CPU_KVCACHE_SPACE=2 VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=180s --timeout=3s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# no shell and no make in between: signals reach the server
ENTRYPOINT ["quest-vllm", "serve"]
CMD [".cache/models/SmolLM2-135M-Instruct", "--served-model-name", "SmolLM2-135M-Instruct", \
     "--host", "0.0.0.0", "--port", "8000", "--enforce-eager", "--max-model-len", "8192"]
