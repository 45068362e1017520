"""Eager PyTorch reference of the operations: it defines what is correct.

Knows tensors only: nothing of vLLM, of devices or of speed. Every kernel is tested against it, and it is tested
against dense attention. Arithmetic is float32 whatever the inputs' dtype (float64 stays float64).

Shapes used throughout:

    key_cache, value_cache  [num_blocks, num_kv_heads, block_size, head_dim]
    summaries               [num_blocks, num_kv_heads, pages_per_block, 2, head_dim]   k_min at 0, k_max at 1; or, with
                            page_summary "key_codes", the bytes that quest_vllm.ops.key_codes describes
    block_table             [num_reqs, max_blocks] int32
    seq_lens, page_budgets  [num_reqs] int32
    policies                [num_reqs] int32, places in quest_vllm.config.POLICIES; None: every row the call's own
    log_sums                [num_reqs, num_q_heads] float32, log of the mass that a head's pages are estimated to hold
    page_scores             [num_reqs, num_score_heads, max_pages] float32
    selected_pages          [num_reqs, num_score_heads, max_page_budget] int32, ascending, -1 padded

``num_score_heads`` is ``num_kv_heads``, or ``num_q_heads`` where pages are chosen per query head.
"""

from __future__ import annotations

import torch

from quest_vllm.config import GROUP_REDUCTIONS, PAGE_SUMMARIES, POLICIES, TWO_STAGE, WINDOW
from quest_vllm.ops import key_codes


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def num_pages(seq_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """Pages that hold at least one token, for each request: ``ceil(seq_len / page_size)``."""
    return (seq_lens + page_size - 1) // page_size


def page_table(block_table: torch.Tensor, pages_per_block: int) -> torch.Tensor:
    """Turn block ids into global page ids.

    Returns ``[num_reqs, max_blocks * pages_per_block]``; global page ``g`` is page ``g % pages_per_block`` of block
    ``g // pages_per_block``.
    """
    sub_pages = torch.arange(pages_per_block, device=block_table.device)
    return (block_table.long()[:, :, None] * pages_per_block + sub_pages).flatten(1)


def update_page_summaries(
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    page_size: int,
    page_summary: str = "min_max",
) -> None:
    """Recompute, in place, the min/max or the codes of every page that ``slot_mapping`` wrote to.

    ``slot_mapping`` is ``[num_tokens] int64``; negative slots are padding. A page's summary covers its rows from 0 to
    the last row written in this call, read back from the cache: the stale summary of a reused block is never merged,
    so the update is idempotent, and right for chunked prefill and copied partial blocks. Quest, section 3.3.
    """
    check_page_summary(page_summary, key_cache.shape[3], page_size)
    block_size = key_cache.shape[2]
    slots = slot_mapping[slot_mapping >= 0]
    last_written: dict[int, int] = {}
    for slot in slots.tolist():
        page = slot // page_size
        last_written[page] = max(last_written.get(page, 0), slot % page_size)
    pages_per_block = block_size // page_size
    for page, last in last_written.items():
        block, sub_page = divmod(page, pages_per_block)
        first_row = sub_page * page_size
        if page_summary == "key_codes":
            rows = key_cache[block, :, first_row : first_row + page_size]
            written = torch.full(rows.shape[:1], last + 1, device=rows.device)
            key_codes.code_bytes(summaries)[block, :, sub_page] = key_codes.encode(rows, written)
            continue
        rows = key_cache[block, :, first_row : first_row + last + 1]
        summaries[block, :, sub_page, 0] = rows.amin(dim=1)
        summaries[block, :, sub_page, 1] = rows.amax(dim=1)


def check_page_summary(page_summary: str, head_dim: int, page_size: int) -> None:
    """Raise ``ValueError`` for an unknown kind of summary, or one that pages of this shape cannot have."""
    if page_summary not in PAGE_SUMMARIES:
        raise ValueError(f"page_summary: expected one of {PAGE_SUMMARIES}, got {page_summary!r}")
    if page_summary == "key_codes":
        key_codes.check_sizes(head_dim, page_size)


def check_bound_radius(bound_radius: float) -> None:
    """Raise ``ValueError`` unless ``bound_radius`` lies in [0, 1]."""
    if not 0.0 <= bound_radius <= 1.0:
        raise ValueError(f"bound_radius: expected a number from 0 to 1, got {bound_radius!r}")


def split_query(query: torch.Tensor, bound_radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(lo, hi)`` of the query's shape, with ``q.mid + bound_radius * |q|.rad = lo.k_min + hi.k_max``.

    ``lo = (q - a |q|) / 2`` and ``hi = (q + a |q|) / 2``, without their overflow; ``min(q, 0)`` and ``max(q, 0)`` at 1.
    """
    check_bound_radius(bound_radius)
    negative, positive = query.clamp(max=0), query.clamp(min=0)
    if bound_radius == 1.0:
        return negative, positive
    near, far = (1.0 + bound_radius) / 2, (1.0 - bound_radius) / 2
    return near * negative + far * positive, far * negative + near * positive


def group_mass(logits: torch.Tensor, log_sums: torch.Tensor | None = None) -> torch.Tensor:
    """Log of the softmax over pages, summed over the heads: ``[..., group, pages]`` to ``[..., pages]``.

    In log space, so that no page's mass underflows into a tie. ``log_sums`` ``[..., group]`` are the heads'
    normalisers, :func:`log_sum` of ``logits`` unless given.
    """
    return (logits - (log_sum(logits) if log_sums is None else log_sums)[..., None]).logsumexp(dim=-2)


def log_sum(logits: torch.Tensor) -> torch.Tensor:
    """Log of a head's mass over its pages, ``[..., pages]`` to ``[...]``; NaNs are left out."""
    total = logits.masked_fill(logits.isnan(), float("-inf")).logsumexp(dim=-1)
    return total.masked_fill(total == float("-inf"), 0.0)  # no page has mass: keep -inf, not NaN


def score_pages(
    query: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    group_reduction: str = "max",
    bound_radius: float = 1.0,
    scale: float = 1.0,
    page_summary: str = "min_max",
    policies: torch.Tensor | None = None,
    log_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score each page from its summary.

    ``query`` is ``[num_reqs, num_q_heads, head_dim]``. A page's bound for one query head is
    ``q.mid + bound_radius * |q|.rad``, with ``mid = (k_max + k_min) / 2`` and ``rad = (k_max - k_min) / 2``. At
    ``bound_radius`` 1 that is ``sum_d max(q_d * k_min_d, q_d * k_max_d) = relu(q).k_max + min(q, 0).k_min``, which no
    ``q.k`` of the page exceeds (Quest, algorithm 1); at 0 it is the score of the box's centre; between, an estimate.

    ``group_reduction`` makes one score of a GQA group's bounds: "max", "mean", "mass", or "per_query_head" (none).
    "mass" is the log of the attention mass that the bounds promise, each head's softmax over the row's pages summed
    over the group: ``log(sum_g exp(s_gp - logsumexp_p(s_gp)))`` with ``s = scale * bound``; ``scale``, the attention's,
    matters there alone. A NaN bound makes its own page's score NaN and counts for nothing in other pages' scores.

    With ``page_summary`` "key_codes" a page's bound is instead the log of the mass that its codes promise
    (:func:`quest_vllm.ops.key_codes.page_logits`): ``scale`` is inside it, and ``bound_radius`` has no meaning.

    Where the reduction is "mass", ``policies`` lets a row have "max" or "mean" instead, of ``s``: logs of mass, as the
    others' scores are. A row with the policy "two_stage" has the mass; what one with "window" scores has no meaning.
    ``log_sums``, as above, receives the heads' normalisers there, for :func:`rerank_pages`.

    Pages past the end of a request score -inf. Returns ``[num_reqs, num_score_heads, max_pages]`` float32. Raises
    ``ValueError`` for an unknown reduction and a radius outside [0, 1].
    """
    num_reqs, _, head_dim = query.shape
    _, num_kv_heads, pages_per_block, _, _ = summaries.shape
    check_page_summary(page_summary, head_dim, page_size)
    pages = page_table(block_table, pages_per_block)
    valid = torch.arange(pages.shape[1], device=query.device) < num_pages(seq_lens, page_size)[:, None]
    pages = torch.where(valid, pages, 0)
    q = _wide(query).view(num_reqs, num_kv_heads, -1, head_dim)
    if page_summary == "key_codes":
        bound, scale = _coded_bounds(q, summaries, pages, seq_lens, scale), 1.0
    else:
        flat = summaries.transpose(1, 2).flatten(0, 1)  # [global pages, num_kv_heads, 2, head_dim]
        rows = _wide(flat[pages])  # [num_reqs, max_pages, num_kv_heads, 2, head_dim]
        low, high = split_query(q, bound_radius)
        bound = torch.einsum("rhgd,rphd->rhgp", low, rows[..., 0, :])
        bound = bound + torch.einsum("rhgd,rphd->rhgp", high, rows[..., 1, :])
    if group_reduction == "max":
        scores = bound.amax(dim=2)
    elif group_reduction == "mean":
        scores = bound.mean(dim=2)
    elif group_reduction == "mass":
        logits = (bound * scale).masked_fill(~valid[:, None, None, :], float("-inf"))
        sums = log_sum(logits)
        scores = group_mass(logits, sums)
        if log_sums is not None:
            log_sums.copy_(sums.flatten(1))
        if policies is not None:
            for name, joined in (("max", logits.amax(dim=2)), ("mean", logits.mean(dim=2))):
                scores = torch.where((policies == POLICIES.index(name))[:, None, None], joined, scores)
    elif group_reduction == "per_query_head":
        scores = bound.flatten(1, 2)
    else:
        raise ValueError(f"group_reduction: expected one of {GROUP_REDUCTIONS}, got {group_reduction!r}")
    return scores.masked_fill(~valid[:, None, :], float("-inf")).float()


def _coded_bounds(
    query: torch.Tensor, summaries: torch.Tensor, pages: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """``[num_reqs, num_kv_heads, group, max_pages]`` of a query ``[num_reqs, num_kv_heads, group, head_dim]``."""
    coded = key_codes.code_bytes(summaries).transpose(1, 2).flatten(0, 1)  # [global pages, num_kv_heads, bytes]
    starts = torch.arange(pages.shape[1], device=pages.device) * key_codes.TOKENS
    tokens = (seq_lens[:, None] - starts).clamp(0, key_codes.TOKENS)  # [num_reqs, max_pages]
    bounds = [  # a row at a time: an estimate of every key of a request is large
        key_codes.page_logits(row, coded[own].transpose(0, 1), count.expand(row.shape[0], -1), scale=scale)
        for row, own, count in zip(query, pages, tokens, strict=True)
    ]
    return torch.stack(bounds) if bounds else query.new_zeros(0, *query.shape[1:3], pages.shape[1])


def select_pages(
    page_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    max_page_budget: int,
    top_p: torch.Tensor | None = None,
    mass_scale: float = 1.0,
    policies: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the ``min(page_budget, pages)`` best pages of each row; sink and recent pages are always among them.

    Forced pages count inside the budget; a budget smaller than their number keeps the newest pages first, then the
    sinks. Equal scores go to the lower page index; NaN ranks as +inf. Returns
    ``[num_reqs, num_score_heads, max_page_budget]`` int32, ascending, -1 padded.

    ``top_p`` ``[num_reqs]`` float32 lets each row and head take fewer: pages are taken in that order, the forced ones
    first, until they hold ``top_p`` of the estimated mass of all the pages that the budget would have taken. A page's
    estimated mass is ``exp(mass_scale * score)``: ``mass_scale`` is the attention's scale, and 1 for scores that are
    logs of mass already (:func:`mass_scale_of`). At ``top_p`` 1 or above, and where the mass of a taken page is not
    finite, the budget is spent.

    A row whose entry of ``policies`` is "window" takes the newest pages instead, but for ``sink_pages`` of its budget;
    none of its pages competes.
    """
    total = num_pages(seq_lens, page_size).long()[:, None]  # [num_reqs, 1]
    take = torch.minimum(page_budgets.long()[:, None], total).clamp(max=max_page_budget)  # [num_reqs, 1]
    newest = torch.full_like(take, recent_pages)
    if policies is not None:
        is_window = (policies == POLICIES.index(WINDOW))[:, None]
        newest = torch.where(is_window, (take - sink_pages).clamp(min=recent_pages), newest)
    ranked, num_forced = _rank_pages(page_scores, total, sink_pages, newest)
    ranked = ranked[..., :max_page_budget]
    if top_p is not None:
        needed = _pages_for_mass(page_scores.gather(-1, ranked) * mass_scale, take, top_p)
        take = torch.maximum(needed, torch.minimum(num_forced, take))  # [num_reqs, num_heads]
    kept = torch.arange(ranked.shape[-1], device=ranked.device) < take[:, :, None]
    return _ascending(ranked, kept, max_page_budget)


def shortlist_pages(
    page_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    max_page_budget: int,
    policies: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of rows with the policy "two_stage": the pages that an error of their scores may bring into the budget or out.

    Where a row takes ``n`` pages, those are the pages between rank ``n // 2`` and rank ``n + (n + 1) // 2``, as
    :func:`select_pages` ranks them, but for forced pages: up to ``n + 1``. Rows that take forced pages alone, or all of
    their pages, and those of other policies have none. Returns ``[num_reqs, num_score_heads, max_page_budget + 1]``
    int32, ascending, -1 padded, for :func:`rerank_pages`.
    """
    total = num_pages(seq_lens, page_size).long()[:, None]
    take = torch.minimum(page_budgets.long()[:, None], total).clamp(max=max_page_budget)
    ranked, num_forced = _rank_pages(page_scores, total, sink_pages, torch.full_like(take, recent_pages))
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    begin, end = torch.maximum(take // 2, num_forced), torch.minimum(take + (take + 1) // 2, total)
    is_open = (take > num_forced) & (take < total)
    listed = (rank >= begin[:, :, None]) & (rank < end[:, :, None]) & is_open[:, :, None]
    if policies is None:
        listed = torch.zeros_like(listed)
    else:
        listed = listed & (policies == POLICIES.index(TWO_STAGE))[:, None, None]
    return _ascending(ranked, listed.expand_as(ranked), max_page_budget + 1)


def _rank_pages(
    page_scores: torch.Tensor, total: torch.Tensor, sink_pages: int, newest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pages, best first, and how many of them are forced: ``[num_reqs, num_heads, max_pages]``, ``[num_reqs, 1]``.

    ``total`` and ``newest`` are ``[num_reqs, 1]``. Newest pages first, then sinks, oldest first, then by score.
    """
    index = torch.arange(page_scores.shape[2], device=page_scores.device)[None, :]
    recent = (index >= total - newest) & (index < total)
    sink = (index < sink_pages) & (index < total)
    tier = torch.where(recent, 2, torch.where(sink, 1, 0))
    tier = tier.masked_fill(index >= total, -1)[:, None, :].expand_as(page_scores)
    scores = page_scores.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    scores = torch.where(tier == 2, index[None].to(scores.dtype), scores.masked_fill(tier == 1, 0.0))
    by_score = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    by_tier = torch.sort(tier.gather(-1, by_score), dim=-1, descending=True, stable=True).indices
    return by_score.gather(-1, by_tier), (recent | sink).sum(dim=-1, keepdim=True)


def _ascending(ranked: torch.Tensor, kept: torch.Tensor, width: int) -> torch.Tensor:
    """Those of ``ranked [..., pages]`` that are ``kept``, as ``[..., width]`` int32, ascending, -1 padded."""
    nowhere = torch.iinfo(ranked.dtype).max
    pages = torch.where(kept, ranked, nowhere).sort(dim=-1).values[..., :width]
    selected = torch.full((*ranked.shape[:-1], width), -1, dtype=torch.int32, device=ranked.device)
    selected[..., : pages.shape[-1]] = torch.where(pages < nowhere, pages, -1).int()
    return selected


def _pages_for_mass(ranked_log_mass: torch.Tensor, take: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """How many of the first ``take`` ranked pages hold ``top_p`` of their mass: ``[num_reqs, num_heads]``.

    ``ranked_log_mass`` is ``[num_reqs, num_heads, ranks]``, ``take`` ``[num_reqs, 1]``.
    """
    index = torch.arange(1, ranked_log_mass.shape[-1] + 1, device=take.device)
    in_budget = index <= take[:, :, None]
    share = ranked_log_mass.double().masked_fill(~in_budget, float("-inf")).softmax(dim=-1).cumsum(dim=-1)
    wanted = top_p.double()[:, None, None]
    reached = in_budget & (share >= wanted) & (wanted < 1)
    return torch.where(reached, index, take[:, :, None]).amin(dim=-1) if len(index) else take


def rerank_pages(
    page_scores: torch.Tensor,
    log_sums: torch.Tensor,
    shortlist: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The scores again, of the pages on each row's shortlist by their keys.

    ``page_scores`` and ``log_sums`` are :func:`score_pages`' with the reduction "mass", ``shortlist`` ``[num_reqs,
    num_kv_heads, width]`` int32 is :func:`shortlist_pages`'; entries below 0 are skipped. A listed page's score becomes
    the log of the attention mass that its keys really hold, each head's over the mass that all pages are estimated to
    hold, summed over the group; any other page keeps its own. Returns the shape and dtype of ``page_scores``. Reads
    ``2 * head_dim * page_size`` bytes of 16-bit keys a listed page.
    """
    scores = page_scores.clone()
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    offsets = torch.arange(page_size, device=query.device)
    heads = torch.arange(num_kv_heads, device=query.device)[:, None]
    for row in (shortlist >= 0).flatten(1).any(dim=1).nonzero().flatten().tolist():
        listed = shortlist[row].long()  # [num_kv_heads, width]
        absent = listed < 0
        tokens = (listed.clamp(min=0)[:, :, None] * page_size + offsets).flatten(1)
        hidden = absent.repeat_interleave(page_size, dim=1) | (tokens >= seq_lens[row])
        keys = _wide(key_cache[block_table[row].long()[tokens // block_size], heads, tokens % block_size])
        logits = torch.einsum("hgd,htd->hgt", _wide(query[row]).view(num_kv_heads, -1, head_dim), keys) * scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(hidden[:, None], float("-inf")).unflatten(-1, (-1, page_size)).logsumexp(dim=-1)
        mass = group_mass(logits, log_sums[row].view(num_kv_heads, -1)).to(scores.dtype)
        again = torch.nn.functional.pad(scores[row], (0, 1))  # what is absent: a last page
        scores[row] = again.scatter(1, torch.where(absent, scores.shape[2], listed), mass)[:, :-1]
    return scores


def mass_scale_of(group_reduction: str, scale: float, page_summary: str) -> float:
    """What a score is multiplied by to be the log of an estimated mass; ``scale`` is the attention's.

    Masses and whatever key codes promise are such logs already (:func:`score_pages`).
    """
    return 1.0 if group_reduction == "mass" or page_summary == "key_codes" else scale


def sparse_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selected_pages: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend to the selected pages only.

    ``query`` is ``[num_reqs, num_q_heads, head_dim]``; entries of ``selected_pages`` below 0 are skipped and tokens at
    or past ``seq_len`` masked. A row with no token gives zeros. Returns the query's shape and dtype.
    """
    num_reqs, num_q_heads, _ = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    group = num_q_heads // num_kv_heads
    output = torch.zeros_like(query)
    for row in range(num_reqs):
        length = int(seq_lens[row])
        for head in range(num_q_heads):
            kv_head = head // group
            select_head = head if selected_pages.shape[1] == num_q_heads else kv_head
            pages = selected_pages[row, select_head].long()
            pages = pages[pages >= 0]
            tokens = (pages[:, None] * page_size + torch.arange(page_size, device=query.device)).flatten()
            tokens = tokens[tokens < length]
            if tokens.numel() == 0:
                continue
            block = block_table[row].long()[tokens // block_size]
            keys = _wide(key_cache[block, kv_head, tokens % block_size])
            values = _wide(value_cache[block, kv_head, tokens % block_size])
            logits = keys @ _wide(query[row, head]) * scale
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            output[row, head] = (torch.softmax(logits, dim=0) @ values).to(query.dtype)
    return output


def dense_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend to every token: what a budget that covers the context must reproduce. Same shapes as above."""
    num_reqs, block_size, max_blocks = query.shape[0], key_cache.shape[2], block_table.shape[1]
    every_page = torch.arange(max_blocks, dtype=torch.int32, device=query.device)
    return sparse_paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        every_page.expand(num_reqs, key_cache.shape[1], max_blocks),
        page_size=block_size,
        scale=scale,
        softcap=softcap,
    )
