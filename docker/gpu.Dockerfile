# GPU image: vLLM's public image of one version, plus this package.
#   docker build -f docker/gpu.Dockerfile -t quest-vllm .
#   docker run --gpus all --init --shm-size=4g -p 8000:8000 \
#     -v ~/.cache/huggingface:/home/quest/.cache/huggingface quest-vllm MODEL --host 0.0.0.0
# vLLM's image is named by tag alone: give yours by digest with --build-arg VLLM_IMAGE=vllm/vllm-openai@sha256:...
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN python -m pip install --no-cache-dir --require-hashes -r docker/lock-wheel.txt \
    && python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel .

FROM ${VLLM_IMAGE}
USER 0
COPY --from=wheel /wheel /tmp/wheel
# what the package needs is in vLLM's image already; group 0, so that a cluster may choose another user id
RUN python3 -m pip install --no-cache-dir --no-deps /tmp/wheel/*.whl && rm -rf /tmp/wheel \
    && useradd --create-home --uid 10001 --gid 0 quest && chmod -R g=u /home/quest
USER 10001:0
WORKDIR /home/quest
# USER and HOME by name: torch asks for them, and a user id that the cluster chose has no passwd entry
ENV HOME=/home/quest USER=quest QUEST_VLLM_CACHE=/home/quest/.cache/quest_vllm VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=600s --timeout=3s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["quest-vllm", "serve"]
CMD ["--help"]
