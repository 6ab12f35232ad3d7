"""PNG figures of activations: how much channels differ from each other, and how little each varies in itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llm_fp4.api.activations import SiteActivations
from llm_fp4.errors import UnsupportedError
from llm_fp4.progress import Progress, silent
from llm_fp4.storage import output_error

STAGE = "figures"
_INK, _BAND, _MAXIMUM = "#1f4e79", "#9dc3e6", "#c00000"


def draw_activations(sites: Sequence[SiteActivations], folder: str | Path, *, progress: Progress = silent) -> list[Path]:
    """Return the PNG files written to ``folder``: one of each block's input sites, and one of all sites' variances.

    A panel shows, channel by channel, the 10-90 % band, the median and the maximum of magnitudes on a log2 axis: bands
    that lie at different heights are variance between channels, their own height is variance within.

    Raises:
        UnsupportedError: matplotlib is missing. OutputError: the folder cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise UnsupportedError("figures need matplotlib; install it: pip install 'llm-fp4[figures]'")
    folder = Path(folder)
    blocks: dict[str, list[SiteActivations]] = {}
    for site in sites:
        blocks.setdefault(_block(site.name), []).append(site)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for done, (block, members) in enumerate(blocks.items()):
            progress(STAGE, done, len(blocks) + 1)
            written.append(_save(_panels(block, members), folder / f"{_file_name(block)}.png"))
        progress(STAGE, len(blocks), len(blocks) + 1)
        written.append(_save(_variances(sites), folder / "variance.png"))
    except OSError as error:
        raise output_error(error, folder) from None
    progress(STAGE, len(blocks) + 1, len(blocks) + 1)
    return written


def _block(site: str) -> str:
    """Return the name up to its first number, which counts blocks; a site outside every block stands alone."""
    found = re.match(r"(.*?\.\d+)\.", site)
    return found.group(1) if found else site


def _file_name(block: str) -> str:
    """Return a name that sorts blocks in their order: model.layers.3 becomes model-layers-003."""
    padded = re.sub(r"\d+", lambda n: n.group().zfill(3), block)
    return re.sub(r"[^A-Za-z0-9_]+", "-", padded)


def _panels(block: str, sites: Sequence[SiteActivations]) -> Any:
    from matplotlib.figure import Figure

    columns = min(2, len(sites))
    rows = -(-len(sites) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.0 * rows), layout="constrained")
    figure.suptitle(f"{block}: magnitude of each input channel")
    for axes, site in zip(figure.subplots(rows, columns, squeeze=False).flat, sites, strict=False):
        order = site.channel_absmax.argsort(descending=True)
        low, middle, high = site.channel_quantiles[:, order].clamp_min(2.0**-24)
        x = torch.arange(len(order)).numpy()
        axes.fill_between(x, low.numpy(), high.numpy(), color=_BAND, linewidth=0, label="10-90 % of tokens")
        axes.plot(x, middle.numpy(), color=_INK, linewidth=0.8, label="median token")
        axes.plot(x, site.channel_absmax[order].clamp_min(2.0**-24).numpy(), color=_MAXIMUM, linewidth=0.8, label="maximum")
        axes.set_yscale("log", base=2)
        title = site.name.removeprefix(block).strip(".") or block
        variances = f"variance between channels {site.inter_channel:.2f}, within {site.intra_channel:.2f} octaves²"
        axes.set_title(f"{title}\n{variances}", fontsize=9)
        axes.set_xlabel("channel, by maximum", fontsize=8)
        axes.set_ylabel("|x|", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in figure.axes[len(sites) :]:
        axes.set_axis_off()
    figure.axes[0].legend(fontsize=7, loc="upper right")
    return figure


def _variances(sites: Sequence[SiteActivations]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    axes = figure.subplots()
    x = torch.arange(len(sites)).numpy()
    axes.plot(x, [s.inter_channel for s in sites], "o-", color=_MAXIMUM, markersize=3, linewidth=0.8, label="between channels")
    axes.plot(x, [s.intra_channel for s in sites], "o-", color=_INK, markersize=3, linewidth=0.8, label="within a channel")
    axes.axhline(2.567, color="grey", linewidth=0.6, linestyle=":", label="within, if normal")
    axes.set_xlabel("input site, in the order they run")
    axes.set_ylabel("variance of log2|x| (octaves²)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same figure, the same bytes
    return path
