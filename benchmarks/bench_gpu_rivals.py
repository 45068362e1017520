"""One layer's decode attention on a GPU beside others' page selection, and beside FlashInfer, in one run.

usage: bench_gpu_rivals.py [--cases N] [--only NAME ...] [--output FILE.json]
       bench_gpu_rivals.py --build

Shapes, clocks and our own chain are bench_gpu_ops.py's. amass-kv and locks-kv (``pip install amass-kv locks-kv``) run
through their own public functions at equal tokens attended: their budgets, first and newest page included, are ours.
Their page records hold random codes, since what a record says changes no kernel's work; keys and values are random
like ours, in the layout their kernels read. What a step does once for all layers is left out for all. ``error`` is the
largest difference to attention in float32 over the pages that the package chose, in the first row.
FlashInfer's decode (``pip install flashinfer-python``) is dense.

Packages that are not installed are left out, and the result says so. All three build CUDA modules at first use, one
after the other; ``--build`` builds them before, each in a process of its own, into the same caches.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_gpu_ops import (
    CASES,
    DIM,
    GROUP,
    KEY_CODES,
    KV_HEADS,
    PAGE,
    SCALE,
    Layers,
    copy_bandwidth,
    ratio,
    show,
    time_layers,
)
from provenance import commit, save

from quest_vllm import compat
from quest_vllm.ops import cuda

SPLITS = 128  # most splits of a row that both packages allocate in vLLM
FORCED = 2  # their first and newest page
WORKSPACE_BYTES = 256 * 2**20


@dataclass
class Chain:
    """A rival on one shape. ``steps``: one decode step on each layer's cache; ``check``: the first layer's result."""

    steps: list[Callable[[], object]]
    check: Callable[[], dict[str, float]]
    keep: list[Any] = field(default_factory=list)


def without_plugin(package: str) -> None:
    """Let ``package.backend`` be a bare package: importing it would import the hooks into vLLM, of other versions."""
    name = f"{package}.backend"
    if name not in sys.modules:
        bare = types.ModuleType(name)
        bare.__path__ = [str(Path(folder) / "backend") for folder in importlib.import_module(package).__path__]
        sys.modules[name] = bare


def token_major_caches(layers: Layers) -> list[torch.Tensor]:
    """``[blocks, 2, page_size, KV heads, head_dim]`` of every layer: vLLM's own layout."""
    blocks = layers.table.numel()
    size = (blocks, 2, PAGE, KV_HEADS, DIM)
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in layers.views]


def state_sizes(layers: Layers) -> dict[str, int]:
    """What amass-kv's and locks-kv's states are told alike."""
    return {
        "num_layers": len(layers.views),
        "num_blocks": layers.table.numel(),
        "n_kv": KV_HEADS,
        "G": GROUP,
        "head_dim": DIM,
        "page": PAGE,
        "max_reqs": layers.batch,
        "max_pages": layers.blocks,
    }


def fill(*tensors: torch.Tensor) -> None:
    """Random codes for integers, small positive scales for the rest."""
    for tensor in tensors:
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        else:
            tensor.uniform_(0.005, 0.02)


def selection_error(layers: Layers, state: Any, cache: torch.Tensor, output: torch.Tensor) -> dict[str, float]:
    """Pages attended, mean over rows and heads, and the error of the first row against float32 over those pages."""
    counts = state.page_cnt[: layers.batch]
    query = layers.query[0].float().view(KV_HEADS, GROUP, DIM)
    worst = 0.0
    for head in range(KV_HEADS):
        pages = state.page_table[0, head, : int(counts[0, head])].long()
        rows = cache[layers.table[0].long()[pages], :, :, head].float()  # [pages, 2, page_size, head_dim]
        keys, values = (rows[:, part].flatten(0, 1) for part in (0, 1))
        expected = torch.softmax(query[head] @ keys.T * SCALE, dim=-1) @ values
        worst = max(worst, float((output[0].view(KV_HEADS, GROUP, DIM)[head].float() - expected).abs().max()))
    return {"pages_attended": float(counts.float().mean()), "error": worst}


def amass(layers: Layers, budget: int, combine: str = "nrm") -> Chain:
    """amass-kv with its quadratic page score, int4, and its CUDA kernels; ``combine``: "nrm" is its default."""
    without_plugin("amass")
    from amass.attention.decode import ResidentVSource, ensure_stage_b_buffers
    from amass.attention.decode_cuda import sparse_paged_decode_batched_cuda
    from amass.selection import QuadState, derive_page_params
    from amass.selection.quad_score_cuda import quad_score_cuda
    from amass.selection.select_cuda import topb_select_cuda

    chosen = budget // PAGE - FORCED
    caches = token_major_caches(layers)
    state = QuadState(
        "cuda",
        **state_sizes(layers),
        budget=(chosen - 0.5) / (layers.blocks - FORCED),  # rounded up to whole pages there
        v_bits=4,
        combine=combine,
    )
    state.D, state.scale = state.d, SCALE
    ensure_stage_b_buffers(state, "cuda", SPLITS)
    fill(state.quad_mu, state.mu_scale, state.quad_V, state.V_scale, state.quad_sig2)
    derive_page_params(state, layers.lengths, layers.batch)
    output = torch.empty_like(layers.query)

    def step(layer: int) -> None:
        rows = (layers.query, layers.table, layers.lengths)
        quad_score_cuda(state, layer, *rows, layers.batch, SCALE)
        topb_select_cuda(state, layers.batch)
        source = ResidentVSource(caches[layer])
        sparse_paged_decode_batched_cuda(
            layers.query, caches[layer], layers.table, layers.lengths, state, output, source, scale=SCALE
        )

    def check() -> dict[str, float]:
        step(0)
        return selection_error(layers, state, caches[0], output)

    return Chain([lambda layer=layer: step(layer) for layer in range(len(caches))], check)


def locks(layers: Layers, budget: int, cuda_decode: bool = False) -> Chain:
    """locks-kv as its dispatch table has it (CUDA score and selection, Triton attention), or CUDA attention too."""
    without_plugin("locks")
    from locks.attention.decode import ResidentVSource, ensure_stage_b_buffers, sparse_paged_decode_batched
    from locks.attention.decode_cuda import sparse_paged_decode_batched_cuda
    from locks.selection.rki4_score_cuda import rki4_score_state
    from locks.selection.rki4_state import Rki4State
    from locks.selection.select import derive_page_params

    caches = token_major_caches(layers)
    state = Rki4State("cuda", **state_sizes(layers), budget_pages=budget // PAGE - FORCED)
    state.D, state.scale = state.d, SCALE
    ensure_stage_b_buffers(state, "cuda", SPLITS)
    fill(state.pp_v4, state.pp_vs, state.pp_c8, state.pp_cs, state.pp_mu8, state.pp_mus)
    derive_page_params(state, layers.lengths, layers.batch)
    output = torch.empty_like(layers.query)
    attend = sparse_paged_decode_batched_cuda if cuda_decode else sparse_paged_decode_batched

    def step(layer: int) -> None:
        rows = (layers.table, layers.lengths)
        rki4_score_state(state, layer, layers.query, *rows, layers.batch, SCALE)
        source = ResidentVSource(caches[layer])
        attend(layers.query, caches[layer], *rows, state, output, source, scale=SCALE)

    def check() -> dict[str, float]:
        step(0)
        return selection_error(layers, state, caches[0], output)

    return Chain([lambda layer=layer: step(layer) for layer in range(len(caches))], check)


def flashinfer(layers: Layers, budget: int, tensor_cores: bool = True) -> Chain:
    """FlashInfer's paged decode over the whole context; ``budget`` is not used."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    blocks = layers.table.numel()
    size = (blocks, 2, KV_HEADS, PAGE, DIM)
    caches = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in layers.views]
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    indptr = layers.starts * layers.blocks
    last = layers.ints([PAGE] * layers.batch)
    indices = layers.table.flatten().contiguous()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    shape = (KV_HEADS * GROUP, KV_HEADS, DIM, PAGE)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(indptr, indices, last, *shape, sm_scale=SCALE, **dtypes)
    output = torch.empty_like(layers.query)

    def check() -> dict[str, float]:
        wrapper.run(layers.query, caches[0], out=output)
        rows = caches[0][layers.table[0].long()].float()  # [pages, 2, KV heads, page_size, head_dim]
        keys, values = (rows[:, part].transpose(0, 1).flatten(1, 2) for part in (0, 1))
        query = layers.query[0].float().view(KV_HEADS, GROUP, DIM)
        expected = torch.softmax(query @ keys.transpose(1, 2) * SCALE, dim=-1) @ values
        return {"error": float((output[0].float() - expected.flatten(0, 1)).abs().max())}

    steps = [lambda cache=cache: wrapper.run(layers.query, cache, out=output) for cache in caches]
    return Chain(steps, check, [workspace, wrapper])


# name: distribution, builder
RIVALS: dict[str, tuple[str, Callable[[Layers, int], Chain]]] = {
    "amass_quad": ("amass-kv", amass),
    "amass_quad_max": ("amass-kv", lambda layers, budget: amass(layers, budget, "max")),
    "locks": ("locks-kv", locks),
    "locks_cuda": ("locks-kv", lambda layers, budget: locks(layers, budget, cuda_decode=True)),
    "flashinfer": ("flashinfer-python", flashinfer),
    "flashinfer_cuda_cores": ("flashinfer-python", lambda layers, budget: flashinfer(layers, budget, False)),
}

# what the rivals build at first use: module, function, arguments
MODULES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "amass_score": ("amass.selection.quad_score_cuda", "_get_i8w", {"v_bits": 4}),
    "amass_combine": ("amass.selection.quad_score_cuda", "_get_nrm", {}),
    "amass_select": ("amass.selection.select_cuda", "_get", {}),
    "amass_attend": ("amass.attention.decode_cuda", "_get", {}),
    "locks_score": ("locks.selection.rki4_score_cuda", "_get", {}),
    "locks_select": ("locks.selection.select_cuda", "_get", {}),
    "locks_attend": ("locks.attention.decode_cuda", "_get", {"gtile": GROUP, "dmax": DIM, "page": PAGE}),
    "flashinfer_decode": ("flashinfer.jit.attention", "gen_batch_decode_module", {}),
    "flashinfer_prefill": ("flashinfer.jit.attention", "gen_batch_prefill_module", {}),
}


def measure(make: Callable[[Layers, int], Chain], layers: Layers, budget: int) -> dict[str, Any]:
    """Times and correctness of one rival on one shape, or why it did not run."""
    torch.cuda.empty_cache()
    try:
        chain = make(layers, budget)
        checked = chain.check()
        return {**time_layers(chain.steps), **checked}
    except Exception as error:  # another project's code on a shape it may not know: the other rivals go on
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def run_case(batch: int, context: int, budget: int, bandwidth: float, names: list[str]) -> dict[str, Any]:
    """Time one shape: FlashAttention 3, ours, and every rival."""
    bytes_read = batch * KV_HEADS * 2 * DIM * 2 * (context // PAGE + budget)
    layers = Layers(batch, context, bytes_read)
    budgets = layers.ints([budget // PAGE] * batch)
    case: dict[str, Any] = {"batch": batch, "context": context, "budget": budget, "layers": len(layers.views)}
    case["fa3"] = layers.time(layers.dense)
    case["quest"] = layers.time(lambda views: layers.quest(views, cuda, budgets))
    layers.encode()
    case["quest_key_codes"] = layers.time(lambda views: layers.quest(views, cuda, budgets, **KEY_CODES))
    case["limit"] = bytes_read / bandwidth
    layers.views = layers.views[:1] * len(layers.views)  # rivals bring caches of their own
    case["rivals"] = {name: measure(RIVALS[name][1], layers, budget) for name in names}
    others = {"fa3": case["fa3"]} | {name: found for name, found in case["rivals"].items() if "failed" not in found}
    for ours in ("quest", "quest_key_codes"):
        case[f"{ours}_speedup"] = {
            name: ratio({way: found[way] for way in case[ours]}, case[ours]) for name, found in others.items()
        }
    return case


def find_headers() -> None:
    """Let compilers find the CUDA libraries' headers in pip's packages: a toolkit may hold nvcc's own alone."""
    spec = importlib.util.find_spec("nvidia")
    folders = [
        str(path) for root in (spec and spec.submodule_search_locations) or () for path in Path(root).glob("*/include")
    ]
    os.environ["CPATH"] = os.pathsep.join([*filter(None, [os.environ.get("CPATH")]), *folders])


def build(name: str) -> None:
    """Build one of :data:`MODULES`. Without a GPU too: they are for sm_90a, whatever there is."""
    module, function, settings = MODULES[name]
    if name.startswith("flashinfer"):
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
        kinds = (torch.bfloat16,) * 3 + (torch.int32,)
        front = ("fa2",) if name == "flashinfer_prefill" else ()
        back = (False,) if name == "flashinfer_prefill" else ()
        spec = getattr(importlib.import_module(module), function)(*front, *kinds, DIM, DIM, 0, False, False, *back)
        spec.build_and_load()
        return
    without_plugin(module.split(".")[0])
    if getattr(importlib.import_module(module), function)(**settings) is None:
        raise RuntimeError(f"{name}: the package's own build failed; its output says why")


def build_all(names: list[str]) -> int:
    """Build the modules of the named rivals, all at once; how many failed."""
    wanted = [name for name in MODULES if any(rival.split("_")[0] == name.split("_")[0] for rival in names)]
    begin = time.monotonic()
    command = [sys.executable, __file__, "--build-module"]
    running = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in wanted
    }
    failed = 0
    for name, process in running.items():
        output, _ = process.communicate()
        failed += process.returncode != 0
        outcome = "built" if process.returncode == 0 else f"FAILED: {output[-1500:]}"
        print(f"{time.monotonic() - begin:.0f} s {name}: {outcome}", flush=True)
    return failed


def installed(names: list[str]) -> dict[str, str | None]:
    """The version of each named rival's distribution; None: not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        distribution = RIVALS[name][0]
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = None
    return found


def main() -> None:
    """Run every shape and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES), help="run the first so many")
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--build", action="store_true", help="build the rivals' CUDA modules, and time nothing")
    parser.add_argument("--build-module", choices=MODULES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    find_headers()
    if arguments.build_module:
        build(arguments.build_module)
        return
    versions = installed(arguments.only)
    names = [name for name in arguments.only if versions[RIVALS[name][0]]]
    if arguments.build:
        sys.exit(build_all(names))
    bandwidth = copy_bandwidth()
    cases = [show(run_case(*case, bandwidth, names)) for case in CASES[: arguments.cases]]
    document = {
        "benchmark": "gpu_rivals",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": compat.vllm_version(),
        "rivals": versions,
        "command": " ".join(sys.argv),
        "commit": commit(),
        "copy_TBps": bandwidth / 1e6,
        "unit": "microseconds a layer",
        "cases": cases,
    }
    save(document, arguments.output)


if __name__ == "__main__":
    main()
