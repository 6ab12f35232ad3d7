"""What an examination says: problems by name, each with one sentence on what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

# check → (whether it makes a model wrong, what to do)
CHECKS: dict[str, tuple[bool, str]] = {
    "missing tensor": (True, "write the checkpoint again, or take the layer off its list of quantized layers"),
    "shape": (True, "write the checkpoint again from one model; these tensors and their description do not belong together"),
    "scale NaN": (True, "quantize again; look for NaN in the source weights and for 0/0 where a block is all zero"),
    "scale infinite": (True, "quantize again; a scale overflowed the type it is stored in, so raise the scale over it"),
    "scale zero": (True, "quantize again with scales clamped to the smallest their type can store; these values all became zero"),
    "scale zero, codes too": (False, "nothing, if the source is zero there; engines that divide by the scale need a positive one"),
    "scale negative": (True, "store magnitudes; engines read the scale as unsigned and take another value"),
    "scale underflow": (True, "make the scale over them smaller, so that block scales leave the subnormal range and keep their digits"),
    "global scale inverted": (True, "store 1 over weight_global_scale, or name it as the factor or divisor that it is"),
    "scale inverted": (True, "store 1 over the scales: values are codes times scale"),
    "input scale inverted": (True, "store 1 over the input's global scale, or name it as the factor or divisor that it is"),
    "input scale": (True, "calibrate the input again; its scale must be a positive finite number"),
    "magnitude": (True, "compare with the float model (--reference); the scales of this layer do not fit the others"),
    "nibble order": (True, "exchange the two codes of every byte (or re-order the word) as the format wants them, and write it again"),
    "fused siblings": (True, "give layers that engines fuse one global scale, the largest, and quantize their blocks under it"),
    "fused siblings, ours": (False, "nothing here; give them one scale before exporting, engines that fuse them take only one"),
    "fused siblings, some float": (False, "quantize or ignore all of them; engines that fuse them refuse the mixture"),
    "skipped layer": (True, "quantize the layer, or add it to the checkpoint's list of ignored layers"),
    "float layer": (False, "nothing, if it was meant to stay in float"),
    "code NaN": (True, "quantize again; NaN reached the codes"),
    "codes saturated": (True, "quantize again with larger scales; so many values at the largest code were clipped"),
    "codes all zero": (True, "quantize again with smaller scales; nearly every value rounded to zero"),
    "codes unused": (True, "check the grid the codes were made for; some of this format's values never occur"),
    "codes not sign-magnitude": (True, "check the grid: the codes look like integers (two's complement or offset) under another name"),
    "negative zero": (False, "nothing, if the engine reads sign and magnitude; write +0 for one that maps this code elsewhere"),
    "unlike the reference": (True, "check that the reference is the model this was made from, and the order of rows and columns"),
    "rough": (False, "compare perplexities (llm-fp4 eval --reference); these weights lost more than 4 bits need to lose"),
}  # fmt: skip


class Problem(NamedTuple):
    """One problem of one layer: the check's name, the layer, and what was seen there."""

    check: str
    where: str
    seen: str


@dataclass(frozen=True)
class Finding:
    """All problems of one check: where, what was seen at the first of them, and what to do."""

    check: str
    wrong: bool
    where: list[str]
    seen: str
    remedy: str


@dataclass
class Diagnosis:
    """The account of one examination.

    Attributes:
        kind: what the checkpoint is. weights: how many were examined, by format.
        findings: what is wrong first. known: sentences on what could be told, and what could not and why.
        codes: how often each code occurs, by format.
    """

    path: str
    kind: str
    weights: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    codes: dict[str, list[int]] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Whether any finding is a mistake, not only worth a look."""
        return any(f.wrong for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        findings = [
            {"check": f.check, "wrong": f.wrong, "where": f.where, "seen": f.seen, "remedy": f.remedy} for f in self.findings
        ]
        return {
            "path": self.path, "kind": self.kind, "wrong": self.wrong, "weights": self.weights, "findings": findings,
            "known": self.known, "codes": self.codes,
        }  # fmt: skip


def collected(problems: list[Problem]) -> list[Finding]:
    """Return one finding a check, those that make a model wrong first, each in the order of ``problems``."""
    grouped: dict[str, list[Problem]] = {}
    for problem in problems:
        grouped.setdefault(problem.check, []).append(problem)
    found = [
        Finding(check, CHECKS[check][0], list(dict.fromkeys(p.where for p in each)), each[0].seen, CHECKS[check][1])
        for check, each in grouped.items()
    ]
    return sorted(found, key=lambda f: not f.wrong)
