# CPU image: the same set-up as `make serve`, in two stages; the second has no compiler.
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/quest_vllm
COPY . .
ENV QUEST_VLLM_CACHE=/opt/quest_vllm/.cache/kernels
RUN make env kernels model

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 make \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home quest
COPY --from=build --chown=quest:quest /opt/quest_vllm /opt/quest_vllm
USER quest
WORKDIR /opt/quest_vllm
ENV QUEST_VLLM_CACHE=/opt/quest_vllm/.cache/kernels HOST=0.0.0.0 PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s --timeout=3s \
    CMD ["/opt/quest_vllm/.venv/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
CMD ["make", "serve"]
