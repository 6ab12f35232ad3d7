"""Checks of one weight by itself: its scales, its magnitude, how often each code occurs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from llm_fp4.doctor.findings import Problem
from llm_fp4.doctor.measures import Measures

ENOUGH = 4096  # values, under which a histogram says nothing
SMALL, LARGE = 1e-5, 30.0  # no trained linear layer's root mean square lies outside ...
USUAL = (1e-4, 3.0)  # ... and nearly all lie within
_UNDERFLOW = 0.01  # share of subnormal scales; blocks of one tensor seldom lie 2^14 under its largest
_SATURATED, _ZERO = 0.35, 0.95  # blocks of 16 scaled by their largest value have 1/16 at the largest code
_UNLIKE = 0.15  # of two histograms that each sum to 1, half the sum of their differences


def scale_problems(m: Measures) -> Iterator[Problem]:
    """Yield what is wrong with the scales, and with the magnitude they give."""
    w = m.weight
    scale = w.scale
    count = scale.numel()

    def share(mask: torch.Tensor) -> str:
        return f"{int(mask.sum()):,} of {count:,} scales"

    if bool((bad := torch.isnan(scale)).any()) or math.isnan(w.second):
        yield Problem("scale NaN", w.name, share(bad) if not math.isnan(w.second) else "the global scale")
    if bool((bad := torch.isinf(scale)).any()) or math.isinf(w.second):
        yield Problem("scale infinite", w.name, share(bad) if not math.isinf(w.second) else "the global scale")
    if w.second == 0 or m.starved:
        seen = "the global scale" if w.second == 0 else f"{m.starved:,} values with a code other than 0 have a scale of 0"
        yield Problem("scale zero", w.name, seen)
    elif m.idle:
        yield Problem("scale zero, codes too", w.name, f"{m.idle:,} of {count:,} scales")
    if (not w.may_be_negative and bool((bad := scale < 0).any())) or w.second < 0:
        yield Problem("scale negative", w.name, share(scale < 0) if w.second >= 0 else "the global scale")
    small = (scale.abs() < w.smallest) & (scale != 0)
    if float(small.sum()) > _UNDERFLOW * count:
        yield Problem("scale underflow", w.name, f"{share(small)} lie below {w.smallest:.3g}, where digits are lost")


def magnitude_problems(m: Measures, embedding: bool) -> Iterator[Problem]:
    """Yield whether the values are implausibly large or small, and whether inverting a scale mends it."""
    w = m.weight
    if embedding or m.rms == 0 or SMALL <= m.rms <= LARGE or not math.isfinite(m.rms):
        return
    seen = f"the values' root mean square is {m.rms:.3g}"
    other = m.rms / w.second**2 if w.two_level and w.second else 0.0
    if USUAL[0] <= other <= USUAL[1]:
        yield Problem("global scale inverted", w.name, f"{seen}; with 1 over the global scale it is {other:.3g}")
    elif USUAL[0] <= m.inverted <= USUAL[1] and not w.two_level:
        yield Problem("scale inverted", w.name, f"{seen}; with 1 over the scales it is {m.inverted:.3g}")
    else:
        yield Problem("magnitude", w.name, seen)


def code_problems(m: Measures) -> Iterator[Problem]:
    """Yield what the histogram of the codes says; formats of more than 4 bits are only asked for NaN."""
    w, counts = m.weight, m.counts.double()
    total = float(counts.sum())
    nan = torch.isnan(w.grid)
    if float(counts[nan].sum()):
        yield Problem("code NaN", w.name, f"{int(counts[nan].sum()):,} codes")
    if len(w.grid) > 16 or total < ENOUGH:
        return
    magnitude = w.grid.abs()
    top, zero = magnitude == magnitude.max(), magnitude == 0
    if float(w.grid.max()) != -float(w.grid.min()):  # an integer grid reaches one further below zero than above it
        top |= w.grid == w.grid.max()
    share = counts / total
    if float(share[top].sum()) > _SATURATED:
        yield Problem("codes saturated", w.name, f"{float(share[top].sum()):.0%} of the values have the largest code")
        return
    if float(share[zero].sum()) > _ZERO:
        yield Problem("codes all zero", w.name, f"{float(share[zero].sum()):.1%} of the values are zero")
        return
    values = sorted({abs(float(v)) for v in w.grid[~zero]} & {float(v) for v in w.grid})  # magnitudes of both signs
    up = torch.stack([counts[w.grid == v].sum() for v in values])
    down = torch.stack([counts[w.grid == -v].sum() for v in values])
    # the two signs' histograms: alike for sign and magnitude, one running backwards for integers
    if not float(up.sum()) or not float(down.sum()) or float((up / up.sum() - down / down.sum()).abs().sum()) / 2 > _UNLIKE:
        seen = f"{int(up.sum()):,} values above zero and {int(down.sum()):,} below are unlike, size by size"
        yield Problem("codes not sign-magnitude", w.name, seen)
    elif dead := [v for v, a, b in zip(values, up, down, strict=True) if a + b == 0]:
        yield Problem("codes unused", w.name, f"no value is ±{', ±'.join(f'{v:g}' for v in dead)} times its scale")
    minus = torch.signbit(w.grid) & zero
    if float(counts[minus].sum()):
        part = float(counts[minus].sum() / counts[zero].sum())
        yield Problem("negative zero", w.name, f"{part:.0%} of the zeros")
