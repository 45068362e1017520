"""The law of ``top_p``, checked on a selection whoever made it."""

from __future__ import annotations

import torch

from tests.kernels.paged import PagedCase

SLACK = 1e-5
"""Share by which a float32 sum may miss the line between one page and the next."""


def assert_top_p_law(
    case: PagedCase, log_mass: torch.Tensor, whole: torch.Tensor, chosen: torch.Tensor, top_p: torch.Tensor
) -> None:
    """``chosen`` are the best of ``whole``, the budget's pages: as few as hold ``top_p`` of its mass, forced included.

    ``log_mass [num_reqs, num_heads, max_pages]`` is float64; one sink and two recent pages are forced.
    """
    for row, length in enumerate(case.seq_lens.tolist()):
        pages = -(-length // case.page_size)
        for head in range(log_mass.shape[1]):
            taken = [page for page in chosen[row, head].tolist() if page >= 0]
            assert chosen[row, head].tolist() == sorted(taken) + [-1] * (chosen.shape[2] - len(taken))
            ceiling = [page for page in whole[row, head].tolist() if page >= 0]
            forced = {0, pages - 2, pages - 1} & set(ceiling)
            assert forced <= set(taken) <= set(ceiling)
            if not ceiling:
                continue
            mass = dict(zip(ceiling, log_mass[row, head, ceiling].softmax(-1).tolist(), strict=True))
            share = sum(mass[page] for page in taken)
            assert share >= float(top_p[row]) - SLACK
            free = set(taken) - forced
            if free:  # without its last page it would fall short
                assert share - min(mass[page] for page in free) < float(top_p[row]) + SLACK
            left = set(ceiling) - set(taken)
            assert not free or not left or min(mass[p] for p in free) >= max(mass[p] for p in left) - SLACK


def assert_same_choice(
    got: torch.Tensor, want: torch.Tensor, whole: torch.Tensor, log_mass: torch.Tensor, top_p: torch.Tensor
) -> None:
    """``got`` is ``want`` but for one page, and that only where the share reaches ``top_p`` within rounding.

    Flags ``[num_reqs, num_heads, max_pages]``, ``whole`` those of the budget; ``log_mass`` float64.
    """
    for row, head in (got != want).any(-1).nonzero().tolist():
        assert whole[row, head][got[row, head]].all() and got[row, head].sum() > 0
        differ = (got[row, head] != want[row, head]).nonzero()[:, 0].tolist()
        assert len(differ) == 1, f"row {row}, head {head}: pages {differ} differ"
        mass = log_mass[row, head].masked_fill(~whole[row, head], float("-inf")).softmax(-1)
        fewer = min(float(mass[flags[row, head]].sum()) for flags in (got, want))
        off = abs(fewer - float(top_p[row]))
        assert off < rounding(log_mass[row, head][whole[row, head]]), f"row {row}, head {head}: off by {off:.3g}"


def rounding(log_mass: torch.Tensor) -> float:
    """By how much shares computed in float32 differ from those of float64: three times what is seen, and a unit of the
    largest logarithm."""
    exact = log_mass.softmax(-1).cumsum(-1)
    peak = log_mass.float().max()
    mass = (log_mass.float() - peak).exp()
    return 3 * float(((mass.cumsum(-1) / mass.sum()).double() - exact).abs().max()) + 2.0**-23 * (
        1 + float(log_mass[log_mass.isfinite()].abs().max())
    )
