"""Turning a finished run into a checkpoint directory, in one step at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llm_fp4.checkpoint.attention import attention_of_plans, caches_of_plans
from llm_fp4.checkpoint.manifest import METHOD, VERSION, manifest_of_plans
from llm_fp4.checkpoint.prefix import prefix_of_plans
from llm_fp4.checkpoint.run_store import RunStore
from llm_fp4.storage import output_error, write_json, write_text


def finish_checkpoint(
    store: RunStore, out: Path, config: dict[str, Any], shapes: dict[str, tuple[int, int]], recipe_yaml: str,
    description: dict[str, Any], save_extras: Callable[[Path], None],
) -> None:  # fmt: skip
    """Write everything beside the shards, then move the directory to ``out``.

    Args:
        config: of the float model; gets ``quantization_config``. shapes: (rows, columns) of every quantized module.
        description: recipe name, bits and the like, for ``quantization_config`` and ``plan.json``.
        save_extras: writes tokenizer and generation config into the directory it is given.
    Raises:
        OutputError: the disk is full or ``out`` appeared meanwhile.
    """
    folder, plans = store.checkpoint, store.plans()
    try:
        save_extras(folder)
    except OSError as error:
        raise output_error(error, folder) from None
    modules = manifest_of_plans(plans, shapes)
    if attention := attention_of_plans(plans):
        description = {**description, "attention": attention}
    if caches := caches_of_plans(plans):
        description = {**description, "cache": caches}
    prefix = store.kept("prefix")
    if modules_with := prefix_of_plans(plans):
        description = {**description, "prefix": {"tokens": (prefix or {})["tokens"], "modules": modules_with}}
    version = VERSION if "prefix" in description else 1
    quantization = {"quant_method": METHOD, "version": version, **description, "modules": modules}
    write_json(folder / "config.json", {**config, "quantization_config": quantization})
    inputs = {n: p for plan in plans for n, p in plan["inputs"].items()}
    weights = {n: p for plan in plans for n, p in plan["weights"].items()}
    products = {n: p for plan in plans for n, p in plan.get("attention", {}).items()}
    caches = {n: p for plan in plans for n, p in plan.get("cache", {}).items()}
    decided = {"inputs": inputs, "weights": weights, **({"attention": products} if products else {})}
    if budget := store.kept("budget"):
        decided["budget"] = budget
    decided |= {"cache": caches} if caches else {}
    decided |= {"prefix": prefix} if prefix else {}
    rebuilt = {plan["block"]: plan["reconstruction"] for plan in plans if "reconstruction" in plan}
    decided |= {"reconstruction": rebuilt} if rebuilt else {}
    write_json(folder / "plan.json", {"version": version, **description, **decided})
    write_text(folder / "recipe.yaml", recipe_yaml)
    weight_map, size = store.weight_map(), 0
    for shard in sorted(set(weight_map.values())):
        with safe_open(folder / shard, "pt") as handle:
            names = handle.keys()  # the handle is no mapping
            size += sum(handle.get_tensor(name).nbytes for name in names)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    try:
        folder.rename(out)
    except OSError as error:
        raise output_error(error, out) from None
    shutil.rmtree(store.folder, ignore_errors=True)
