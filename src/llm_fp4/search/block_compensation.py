"""Error compensation of weights with block scales: GPTQ on scales fixed beforehand, then descent over levels and scales.

Source: GPTQ, arXiv:2210.17323 (see ``compensation``). Columns are visited in the order of their importance, each under
the scale of the block it is stored in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_fp4.numerics import FloatFormat, PerBlock, block_step, max_scale, neighbour
from llm_fp4.recipe import SearchRules
from llm_fp4.search.block_scales import search_scales
from llm_fp4.search.compensation import compensate
from llm_fp4.search.factor import Factor, damped
from llm_fp4.search.refine import sweep_levels
from llm_fp4.search.weights import weight_loss
from llm_fp4.statistics import Gram

_ROWS = 4096  # rows at once: bounds the temporaries of a vocabulary-sized weight
_OFFSETS = (-2, -1, 0, 1, 2)  # candidates of a block's scale while its levels stay


@dataclass(frozen=True)
class BlockGrid:
    """What the values of a weight with block scales may be: the format, its blocks and the scale () over E4M3 scales."""

    format: FloatFormat
    blocks: PerBlock
    second: Tensor | None

    def step(self, stored: Tensor, columns: int) -> Tensor:
        """Return the (rows, columns) float32 step of every value."""
        step = block_step(stored, self.second, self.format)
        return self.blocks.expand(step, (len(stored), columns))


def compensate_blocks(weight: Tensor, gram: Gram, grid: BlockGrid, search: SearchRules) -> tuple[Tensor, Tensor]:
    """Return (out, in) values on the grid and their stored (out, blocks) scales; their output error together is small.

    Each row keeps the best of ``search.starts`` first scales: searched for each block, from the largest magnitude, searched
    for all blocks of a row jointly.
    """
    hessian = damped(gram.qq, search.damping)
    factor = Factor(hessian)
    target, feedback = factor.target(weight, gram), factor.feedback()
    exact = Gram(hessian, None, None)
    parts = []
    for start in range(0, max(len(weight), 1), _ROWS):
        goal = target[start : start + _ROWS]
        top = neighbour(max_scale(grid.blocks.absmax(goal), grid.second, grid.format, grid.blocks), 0, grid.blocks)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for kind in ("independent", "maximum", "joint")[: search.starts]:
            stored = top
            if kind != "maximum":
                stored = search_scales(goal, exact, grid.format, grid.blocks, top, grid.second, joint=kind == "joint")
            values = compensate(goal.t().contiguous(), feedback, grid.step(stored, goal.shape[1]).t().contiguous(), grid.format).t()
            values, stored = refine_blocks(goal, values, stored, hessian, grid, search.sweeps)
            loss = weight_loss(goal, values, hessian, None)
            if best is not None:
                won = (loss < best[2]).unsqueeze(1)
                values, stored = torch.where(won, values, best[0]), torch.where(won, stored, best[1])
                loss = torch.minimum(loss, best[2])
            best = values, stored, loss
        assert best is not None
        parts.append(best[:2])
    return torch.cat([v for v, _ in parts]), torch.cat([s for _, s in parts])


def refine_blocks(
    target: Tensor, values: Tensor, stored: Tensor, hessian: Tensor, grid: BlockGrid, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Return (out, in) values and stored scales whose output error is at most that of ``values``.

    Args:
        target: (out, in) float32. values: (out, in) on the grid of ``stored`` (out, blocks). hessian: (in, in), damped.
        sweeps: passes over all scales, then all levels.
    """
    columns = target.shape[1]
    goal, now = target.t().contiguous(), values.t().contiguous()  # (in, out): a column of the weight is contiguous
    for _ in range(sweeps):
        levels = (now / grid.step(stored, columns).t()).round_()
        stored = fit_scales(goal, levels, stored, hessian, grid)
        step = grid.step(stored, columns).t().contiguous()
        now = sweep_levels(goal, levels * step, step, hessian, grid.format)
    return now.t().contiguous(), stored


def fit_scales(goal: Tensor, levels: Tensor, stored: Tensor, hessian: Tensor, grid: BlockGrid) -> Tensor:
    """Return the stored (out, blocks) scales after one descent over blocks whose levels stay as they are.

    Args:
        goal, levels: (in, out) float32. stored: (out, blocks). hessian: (in, in).
    """
    size, (columns, rows) = grid.blocks.block_size, goal.shape
    short = -columns % size
    goal, levels = (pad(t, (0, 0, 0, short)) for t in (goal, levels))
    hessian = pad(hessian, (0, short, 0, short))
    steps = torch.stack([block_step(neighbour(stored, o, grid.blocks), grid.second, grid.format) for o in _OFFSETS])
    d = goal - levels * grid.step(stored, columns + short).t()
    slope = hessian @ d
    row, chosen = torch.arange(rows, device=goal.device), []
    for b in range(stored.shape[1]):
        here = slice(b * size, (b + 1) * size)
        own = hessian[here, here]
        others = slope[here] - own @ d[here]
        trial = goal[here] - levels[here] * steps[:, None, :, b]  # (candidates, size, out)
        pick = ((own @ trial).add_(others, alpha=2.0).mul_(trial)).sum(1).argmin(0)
        new = trial[pick, :, row].t()
        slope.addmm_(hessian[:, here], new - d[here])
        d[here] = new
        chosen.append(pick)
    return neighbour(stored, torch.stack(chosen, 1) + _OFFSETS[0], grid.blocks)
