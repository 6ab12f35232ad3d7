"""``llm-fp4 inspect``: what a checkpoint holds, what a recipe would do, what activations look like."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_fp4.cli import options
from llm_fp4.cli.budget import average, print_budget
from llm_fp4.cli.prefix import prefix_line
from llm_fp4.cli.render import print_facts, print_json, print_table, size
from llm_fp4.cli.working import working

if TYPE_CHECKING:
    from llm_fp4.api import AttentionReport, CacheReport, Inspection, LayerReport, SiteActivations

FEW = 8  # calibration sequences, where only statistics are wanted


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="SRC|DIR", help="A checkpoint of llm-fp4, or a float model: directory, hub name or .gguf file.")
    ],
    activations: Annotated[
        bool, typer.Option("--activations", help="Statistics of the float model's activations, input by input.")
    ] = False,
    figures: Annotated[
        str | None,
        typer.Option("--figures", metavar="FOLDER", show_default=False, help="Draw them as PNG files there (extra: figures)."),
    ] = None,
    recipe: options.RecipeName = "fpq",
    bits: options.BitsOption = None,
    lm_head_bits: options.LmHeadBits = None,
    attention: options.Attention = None,
    cache_bits: options.CacheBits = None,
    calibration: options.CalibrationSource = None,
    sequences: Annotated[
        int | None,
        typer.Option("--sequences", min=1, metavar="N", show_default=False, help=f"Calibration sequences.  [default: {FEW}]"),
    ] = None,
    length: options.Length = None,
    ignore: options.Ignore = None,
    targets: options.Targets = None,
    seed: options.Seed = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show each layer of a checkpoint, or what a recipe would make of a float model and what stays float and why.

    \b
    Examples:
      llm-fp4 inspect smollm-fp4
      llm-fp4 inspect ./model --bits 16/4/4 --ignore lm_head
      llm-fp4 inspect ./model --activations --figures figures --calibration text.txt
    """
    wish = options.recipe_of(
        recipe, bits=bits, lm_head_bits=lm_head_bits, calibration=calibration, sequences=sequences or FEW, length=length, ignore=ignore,
        targets=targets, attention=attention, cache_bits=cache_bits, seed=seed,
    )  # fmt: skip
    from llm_fp4 import api
    from llm_fp4.models import open_model

    sites: list[SiteActivations] = []
    written: list[str] = []
    with working(quiet) as progress:
        if not activations and figures is None:
            found = api.inspect_model(path, wish)
        else:
            progress("open the model", 0, 1)
            opened = open_model(path)
            progress("open the model", 1, 1)
            found = api.inspect_model(opened, wish)
            sites = api.activation_statistics(opened, wish, device=device, progress=progress)
            if figures is not None:
                written = [str(p) for p in api.draw_activations(sites, figures, progress=progress)]
    if as_json:
        print_json(asdict(found) | ({"activations": [_site(s) for s in sites], "figures": written} if sites else {}))
        return
    _head(found)
    if found.quantized and not sites:
        print_budget(found.budget)
    if sites:
        _activations(sites)
    elif found.quantized:
        _quantized(found.layers)
    else:
        _wish(found.layers)
    if found.attention and not sites:
        _attention(found.attention)
    if found.cache and not sites:
        _cache(found.cache)
    if written:
        print(f"{len(written)} figures in {figures}")


def _head(found: Inspection) -> None:
    disk = ("on disk" if found.quantized else "parameters", size(found.bytes))
    sinks = [("prefix", line)] if (line := prefix_line(found.prefix)) else []
    before = [("float model", size(found.float_bytes)), ("average bits", average(found.average))] if found.quantized else []
    what = f"{found.recipe} ({found.method}) {found.bits}" if found.quantized else f"{found.recipe} {found.bits} would give"
    model = ("model", f"{found.origin} ({found.architecture})")
    print_facts([model, ("recipe", what), disk, *before, *sinks, *_rebuilt(found.reconstruction), *_made(found.fingerprint)])


def _rebuilt(blocks: dict[str, dict[str, Any]] | None) -> list[tuple[str, str]]:
    """Return the line on blocks whose rounding was learned."""
    if not blocks:
        return []
    kept = [b for b in blocks.values() if b["kept"]]
    ratio = f", with {median(b['after'] / b['before'] for b in kept):.2f} of the error (median)" if kept else ""
    return [("rounding", f"learned in {len(kept)} of {len(blocks)} blocks{ratio}")]


def _made(fingerprint: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the lines on what a checkpoint was made from, digests cut to what tells them apart."""
    if fingerprint is None:
        return []
    name = fingerprint["source"].get("name", "")
    digests = ", ".join(f"{k} {fingerprint[k]['sha256'][:12]}" for k in ("source", "recipe", "data"))
    versions = ", ".join(f"{k} {v}" for k, v in fingerprint["versions"].items())
    return [("made from", f"{name} {digests}".strip()), ("made by", versions)]


def _quantized(layers: list[LayerReport]) -> None:
    rows = [
        (
            layer.name, "x".join(map(str, layer.shape)), _formats(layer.weight) + _blocks(layer.blocks), _range(layer.weight_scale),
            "" if layer.kind == "embedding" else _formats(layer.input),
            (layer.granularity or "").removeprefix("per_").replace("_", " "), layer.input_scale,
            " ".join(map(str, layer.shift_histogram or [])), layer.error, layer.reason,
        )
        for layer in layers
    ]  # fmt: skip
    print_table(
        ("layer", "shape", "weight", "row scales", "input", "per", "scale", "channels with shift 0 1 ...", "error", "why"), rows
    )


def _wish(layers: list[LayerReport]) -> None:
    rows = [
        (
            layer.name, layer.kind, "x".join(map(str, layer.shape)), _formats(layer.weight),
            "" if layer.kind == "embedding" else _formats(layer.input), layer.reason,
        )
        for layer in layers
    ]  # fmt: skip
    print_table(("layer", "kind", "shape", "weight", "input", "why"), rows)
    kept = sum(not layer.weight for layer in layers)
    print(f"{len(layers) - kept} layers to quantize, {kept} stay float; norms, biases and all other parameters stay float.")


def _attention(modules: list[AttentionReport]) -> None:
    rows = [(a.name, *(_formats(f) for f in a.formats), *a.errors, a.reason) for a in modules]
    print_table(("attention", "query", "key", "probability", "value", "error of Q·K'", "error of P·V", "why"), rows)


def _cache(modules: list[CacheReport]) -> None:
    rows = [(c.name, *(_formats(f) for f in c.formats), c.window, c.sinks, *c.errors, c.ratio, c.reason) for c in modules]
    columns = ("cache of", "keys", "values", "newest float", "first float", "error of Q·K'", "error of P·V", "times smaller", "why")
    print_table(columns, rows)


def _activations(sites: list[SiteActivations]) -> None:
    rows = [
        (
            s.name, len(s.operands), len(s.channel_absmax), float(s.channel_absmax.max()), float(s.channel_absmax.median()),
            s.inter_channel, s.intra_channel, s.sink_ratio,
        )
        for s in sites
    ]  # fmt: skip
    columns = (
        "input of",
        "readers",
        "channels",
        "largest",
        "median channel max",
        "var. between",
        "var. within",
        "largest/median token",
    )
    print_table(columns, rows)
    print("Variances of log2 magnitude, in octaves squared: between the channels' means, and within a channel (2.57 if normal).")


def _site(site: SiteActivations) -> dict[str, Any]:
    return {
        "name": site.name, "operands": site.operands, "tokens": site.tokens, "inter_channel": site.inter_channel,
        "intra_channel": site.intra_channel, "sink_ratio": site.sink_ratio, "channel_spread": site.channel_spread,
        "channel_absmax": site.channel_absmax.tolist(),
    }  # fmt: skip


def _formats(names: tuple[str, ...]) -> str:
    return " ".join(n.upper() for n in names) or "float"


def _blocks(name: str | None) -> str:
    return "" if name is None else " " + name.removeprefix("per_block_").replace("_", " ")


def _range(scales: tuple[float, float] | None) -> str:
    return "" if scales is None else f"{scales[0]:.3g}..{scales[1]:.3g}"
