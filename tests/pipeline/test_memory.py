"""Memory of a run: what is alive after a block does not grow with the number of blocks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llm_fp4
from llm_fp4.recipe import Recipe


def live_bytes() -> int:
    """Return the bytes of all tensors that something holds, shared storages counted once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_live_tensors_do_not_grow_with_the_blocks(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    tiny_llama(num_hidden_layers=6).save_pretrained(tmp_path / "float")
    recipe = Recipe.model_validate({"search": {"rounds": 1, "compensation": "gptq"}})
    after: list[int] = []

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "quantize":
            gc.collect()
            after.append(live_bytes())

    llm_fp4.quantize(tmp_path / "float", tmp_path / "out", recipe, tokens=torch.randint(2, 258, (2, 32)), progress=watch)
    blocks = after[2:-1]  # before anything, embeddings, six blocks, tail
    assert len(blocks) == 6
    block = 4 * (4 * 32 * 32 + 3 * 32 * 64)  # more than its float weights would be a leak of one block in each
    assert max(blocks) - min(blocks) < block / 2, blocks
