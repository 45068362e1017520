"""Which pages each rank of an engine selects, as hashes. For tests, and for operators who doubt their interconnect.

``llm.collective_rpc(record_selections)``, then some requests, then ``llm.collective_rpc(recorded_selections)``: one
:class:`RankSelections` a rank, for :func:`disagreements` and :func:`by_head`. Recording waits for the device in every
layer, so it is for eager engines, and never for serving.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quest_vllm import compat
from quest_vllm.audit import key_rows, stored_summaries
from quest_vllm.errors import QuestError
from quest_vllm.layers import has_window
from quest_vllm.ops.api import Ops, room_for_log_sums
from quest_vllm.ops.reference import mass_scale_of
from quest_vllm.page_layout import split_chunks

PageLists = list[list[list[int]]]


@dataclass
class RankSelections:
    """What one rank chose since :func:`record_selections`; hashes are hexadecimal, and by layer name.

    ``heads``: of the pages of every row and step, one hash for each head that selects. ``rows``: of the rows' lengths
    and page budgets. ``stored``: of the keys and summaries in the full blocks of the running requests, one for each KV
    head, and ``stored_tokens`` how many tokens those are. ``num_pages`` counts the pages of all rows, heads and layers.
    """

    tensor_rank: int
    stage: int
    num_pages: int = 0
    stored_tokens: int = 0
    heads: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    stored: dict[str, list[str]] = field(default_factory=dict)


class _Recorder:
    """Hashes of one layer's selections, as they grow."""

    def __init__(self) -> None:
        self.heads: list[Any] = []
        self.rows = hashlib.sha256()
        self.num_pages = 0

    def add(self, lengths: list[int], budgets: list[int], pages: PageLists) -> None:
        """Take up one step: of each sparse row its length, its page budget and ``pages[row][head]``."""
        self.rows.update(repr((lengths, budgets)).encode())
        for row in pages:
            self.heads += [hashlib.sha256() for _ in row[len(self.heads) :]]
            for head, chosen in zip(self.heads, row, strict=True):
                head.update(repr(chosen).encode())
                self.num_pages += len(chosen)


_recorders: dict[str, tuple[_Recorder, Ops]] = {}


def record_selections(worker: Any) -> None:
    """Record what every layer of ``worker`` selects from now on.

    Raises :class:`~quest_vllm.errors.QuestError` where CUDA graphs would pass by the recorder.
    """
    mode = getattr(worker.vllm_config.compilation_config, "cudagraph_mode", None)
    if torch.cuda.is_available() and mode is not None and mode.name != "NONE":
        raise QuestError(f"enforce_eager: expected True while selections are recorded, got CUDA graphs {mode.name}")
    _recorders.clear()
    for name, layer in compat.cached_layers(worker).items():
        impl, recorder = layer.impl, _Recorder()
        on_cpu = hasattr(impl, "_layer_ops")
        ops = impl._layer_ops(layer) if on_cpu else impl._ops
        _recorders[name] = recorder, ops
        if on_cpu:
            impl._ops = dataclasses.replace(ops, choose_pages=_recording_choice(ops, recorder))
        else:
            impl._ops = dataclasses.replace(ops, quest_decode=_recording_decode(ops, recorder))


def recorded_selections(worker: Any) -> RankSelections:
    """What ``worker`` recorded; recording ends."""
    parallel = worker.vllm_config.parallel_config
    stage, tensor_rank = divmod(parallel.rank, parallel.tensor_parallel_size)
    found = RankSelections(tensor_rank, stage)
    for name, layer in compat.cached_layers(worker).items():
        recorder, layer.impl._ops = _recorders.pop(name)
        if recorder.heads:
            found.heads[name] = [head.hexdigest() for head in recorder.heads]
            found.rows[name] = recorder.rows.hexdigest()
            found.num_pages += recorder.num_pages
        if not has_window(layer.impl):
            found.stored[name], found.stored_tokens = _stored(worker, name, layer)
    return found


def _recording_choice(ops: Ops, recorder: _Recorder) -> Callable[..., torch.Tensor]:
    """``choose_pages`` of the CPU backend, which calls it with the sparse rows alone."""
    choose_pages = ops.choose_pages
    assert choose_pages is not None  # all implementations for the CPU have it

    def choose(*tensors: Any, **options: Any) -> torch.Tensor:
        seq_lens, budgets = tensors[5], tensors[6]
        selected = choose_pages(*tensors, **options)
        recorder.add(seq_lens.tolist(), budgets.tolist(), _without_padding(selected))
        return selected

    return choose


def _recording_decode(ops: Ops, recorder: _Recorder) -> Callable[..., torch.Tensor]:
    """``quest_decode`` of the CUDA backend, which gets every row: those whose budget covers them choose nothing."""

    def decode(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seq_lens, budgets = tensors[5], tensors[6]
        if ops.name == "cuda":  # the fused launch itself says what it chose
            query, summaries, block_table = tensors[0], tensors[3], tensors[4]
            heads = query.shape[1] if options["group_reduction"] == "per_query_head" else summaries.shape[1]
            flags = torch.zeros(
                len(query), heads, block_table.shape[1] * summaries.shape[2], dtype=torch.uint8, device=query.device
            )
            out = ops.quest_decode(*tensors, **options, chosen=flags)
            pages = [[head.nonzero().flatten().tolist() for head in row] for row in flags]
        else:
            pages = _select_again(ops, tensors, options)
            out = ops.quest_decode(*tensors, **options)
        chooses = (budgets > 0) & (budgets < -(-seq_lens // options["page_size"]))
        kept = chooses.nonzero().flatten().tolist()
        if kept:
            recorder.add(seq_lens[kept].tolist(), budgets[kept].tolist(), [pages[row] for row in kept])
        return out

    return decode


def _select_again(ops: Ops, tensors: Sequence[torch.Tensor], options: dict[str, Any]) -> PageLists:
    query, keys, _, summaries, *rows, budgets = tensors
    policies, choose_pages = options.get("policies"), ops.choose_pages
    assert choose_pages is not None  # all implementations but "cuda" have it
    scoring = {key: options[key] for key in ("page_size", "group_reduction", "bound_radius", "scale", "page_summary")}
    log_sums = room_for_log_sums(query, policies)
    scores = ops.score_pages(query, summaries, *rows, policies=policies, log_sums=log_sums, **scoring)
    choosing = {key: options[key] for key in ("page_size", "sink_pages", "recent_pages", "scale")}
    choosing |= {key: options[key] for key in ("softcap", "top_p") if key in options}
    choosing["mass_scale"] = mass_scale_of(*(options[key] for key in ("group_reduction", "scale", "page_summary")))
    widest = scores.shape[2]
    given = (scores, log_sums, query, keys, *rows, budgets)
    return _without_padding(choose_pages(*given, max_page_budget=widest, policies=policies, **choosing))


def _without_padding(selected: torch.Tensor) -> PageLists:
    """``selected [rows, heads, width]``, -1 padded, as lists."""
    return [[[page for page in head if page >= 0] for head in row] for row in selected.tolist()]


def _stored(worker: Any, name: str, layer: Any) -> tuple[list[str], int]:
    """Hashes of what the layer's full blocks hold for the running requests, by KV head, and how many tokens."""
    config = layer.impl.config
    views = split_chunks(layer.kv_cache, layer.impl.head_size, config.page_size)
    parts = key_rows(views.keys, layer), stored_summaries(views.summaries, config)
    hashes, tokens, block_size = [hashlib.sha256() for _ in range(views.keys.shape[1])], 0, views.keys.shape[2]
    for blocks, length in compat.live_requests(worker, name):
        full = blocks[: length // block_size]
        tokens += len(full) * block_size
        for head, digest in enumerate(hashes):
            for part in parts:
                digest.update(part[full, head].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return [digest.hexdigest() for digest in hashes], tokens


def by_head(ranks: Sequence[RankSelections]) -> dict[str, list[str]]:
    """The hashes of all heads that select, in the order of the model's heads, by layer: comparable between engines."""
    joined: dict[str, list[str]] = {}
    for rank in sorted(ranks, key=lambda found: (found.stage, found.tensor_rank)):
        for name, heads in rank.heads.items():
            joined.setdefault(name, []).extend(heads)
    return joined


def disagreements(ranks: Sequence[RankSelections], num_kv_heads: int, alike: bool = True) -> list[str]:
    """What the ranks of one engine, of a model with ``num_kv_heads``, do not agree on; empty where all is well.

    All see the same rows with the same budgets: in every sparse layer, or with ``layer_shares`` (``alike`` False) each
    layer in every rank. Ranks that share a KV head, of which there are fewer than ranks, store the same keys and
    summaries of it; each selects for its own query heads.
    """
    errors = []
    rows = {(None if alike else name, digest) for rank in ranks for name, digest in rank.rows.items()}
    if len(rows) > len({name for name, _ in rows}):
        where = "all ranks and layers" if alike else "all ranks of a layer"
        errors.append(f"rows and page budgets: expected one hash in {where}, got {len({digest for _, digest in rows})}")
    for stage in sorted({rank.stage for rank in ranks}):
        peers = sorted((rank for rank in ranks if rank.stage == stage), key=lambda rank: rank.tensor_rank)
        for name in peers[0].heads:
            missing = [rank.tensor_rank for rank in peers if name not in rank.heads]
            if missing:
                errors.append(f"{name}: ranks {missing} selected nothing")
        copies = max(1, len(peers) // num_kv_heads)
        for name in peers[0].stored:
            for first in range(0, len(peers), copies):
                if len({tuple(rank.stored[name]) for rank in peers[first : first + copies]}) > 1:
                    errors.append(f"{name}: ranks {first} to {first + copies - 1} store different keys of one KV head")
    return errors
