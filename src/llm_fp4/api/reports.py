"""What an inspection says of a model, as data: its layers, attention products, caches and mean widths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One linear layer or embedding.

    Attributes:
        kind: "linear", "embedding", "experts" (several matrices in one tensor) or "other". shape: (out, in) of a linear, (rows, columns) of an embedding.
        weight: the weight's format, or the candidates of one not quantized yet; empty where it stays float.
        input: likewise of the input. site: the first of the layers that share this input, None where it stays float.
        granularity: of the input's scale, "per_tensor", "per_token" or "per_block_16_e4m3", say. input_scale: its step, the ratio
            of a per-token scale, or the scale over those of blocks.
        blocks: of the weight that share a scale, "per_block_16_e4m3", say; None where rows do.
        weight_scale: smallest and largest over the rows. shift_histogram: how many channels have shift 0, 1, ...
        error: squared output error over the squared output, of the layer's site; None where it was not measured.
        sink_ratio: the largest token of the input over the median one.
        reason: why it is float, or why its input is treated otherwise than the recipe's rule.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight: tuple[str, ...] = ()
    input: tuple[str, ...] = ()
    site: str | None = None
    granularity: str | None = None
    input_scale: float | None = None
    weight_scale: tuple[float, float] | None = None
    shift_histogram: list[int] | None = None
    error: float | None = None
    sink_ratio: float | None = None
    reason: str = ""
    blocks: str | None = None


@dataclass(frozen=True)
class AttentionReport:
    """The two products of one attention module.

    Attributes:
        formats: of query, key, probability and value, candidates where not quantized yet; all empty where they stay float.
        errors: squared error over the squared product of query · key' and of probability · value.
        reason: why they are float.
    """

    name: str
    formats: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    errors: tuple[float | None, float | None] = (None, None)
    reason: str = ""


@dataclass(frozen=True)
class AverageBits:
    """Mean widths of what a checkpoint holds quantized; layers and tables left in float are not counted.

    Attributes:
        weights: bits a code, over the elements of all quantized weights (codes that two modules share count for both); None: no weight is.
        inputs: bits over the elements of one token at every input site, 16 where a quantized linear reads a float input, which is a
            site of its own; None: there is no quantized linear.
        stored: bits an element of the packed weights with their scales, as they lie on disk.
    """

    weights: float | None = None
    inputs: float | None = None
    stored: float | None = None


@dataclass(frozen=True)
class CacheReport:
    """How the keys and values of one attention are kept; empty formats where they stay float, with the reason.

    Attributes:
        formats: of keys and of values, candidates where nothing was decided yet. window, sinks: the newest and the first tokens,
            which stay in float. errors: of scores and outputs, squared over the squared norm. ratio: bytes in float16 over bytes here.
    """

    name: str
    formats: tuple[tuple[str, ...], tuple[str, ...]]
    window: int | None = None
    sinks: int | None = None
    errors: tuple[float | None, float | None] = (None, None)
    ratio: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """What a model holds.

    Attributes:
        quantized: whether it is a checkpoint of ours; else the layers say what ``recipe`` would do.
        bytes: size of the tensors on disk, or of the parameters in their stored type for a float model.
        float_bytes: of the float model a checkpoint was made from.
        attention: its attention modules, where their products are quantized or were to be.
        fingerprint: what a checkpoint was made from: source, recipe and data by digest, and versions; None in older ones.
        average: mean widths of a checkpoint.
        budget: where widths were chosen for one: what they take, what they predict and why, as in plan.json.
        cache: its attention modules, where their keys and values are kept in codes or were to be.
        prefix: the tokens before every sequence that take the part of the attention sink, what was tried and why, as in plan.json; for
            a float model the most there may be; None where none is wanted.
        reconstruction: the error of every block before and after its rounding was learned, as in plan.json; None where it was not.
    """

    origin: str
    quantized: bool
    architecture: str
    recipe: str
    method: str
    bits: str
    bytes: int
    float_bytes: int | None
    layers: list[LayerReport] = field(default_factory=list)
    attention: list[AttentionReport] = field(default_factory=list)
    fingerprint: dict[str, Any] | None = None
    cache: list[CacheReport] = field(default_factory=list)
    average: AverageBits = AverageBits()
    budget: dict[str, Any] | None = None
    prefix: dict[str, Any] | None = None
    reconstruction: dict[str, dict[str, Any]] | None = None
