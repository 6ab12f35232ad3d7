"""The unit of one block: its sites in the order they run, each collected after those before it were quantized."""

from __future__ import annotations

from functools import partial
from typing import Any

from llm_fp4 import ranks
from llm_fp4.calibration import shared_inputs
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import kept_whole
from llm_fp4.nn import expert_lists
from llm_fp4.pipeline.attention import AttentionSites
from llm_fp4.pipeline.caches import decide_caches, place_caches
from llm_fp4.pipeline.learning import learn_transforms
from llm_fp4.pipeline.reconstructing import reconstruct
from llm_fp4.pipeline.sites import Decided, split_sites
from llm_fp4.pipeline.steps import BlockSteps
from llm_fp4.pipeline.units.embeddings import place_embeddings
from llm_fp4.pipeline.units.outer import bridge
from llm_fp4.pipeline.waves import waves
from llm_fp4.pipeline.workspace import Workspace


def block_unit(work: Workspace, unit: int) -> None:
    """Quantize and store the block that runs next, with the linears between it and the stack before; copy one that never runs."""
    place_embeddings(work)
    plans: dict[str, Any] = {"weights": {}, "inputs": {}}
    name = work.runner.next_block()
    if name is None:
        name = _idle_block(work)
        block = work.source.load(work.model, name, work.device)
    else:
        before = bridge(work, name, plans)
        work.runner.check(name)
        block = work.source.load(work.model, name, work.device)
        _quantize(work, name, plans)
    tensors = work.tensors(block, name)
    for layer in plans.pop("outer", []):
        tensors |= work.tensors(before[layer], layer)
    work.finish(name)
    work.store.finish(unit, tensors, {**plans, "block": name}, work.last_blocks())
    if not work.keep:
        work.source.release(work.model, name)


def _quantize(work: Workspace, name: str, plans: dict[str, Any]) -> None:
    """Quantize the linears, attention products and caches of a block in place; ``plans`` gains their JSON."""
    recipe, block, batches = work.recipe, work.model.get_submodule(name), len(work.batches)
    selected = work.selected(work.structure.linears[name])
    run = partial(work.runner.run, name)
    if work.prefix is not None:
        plans["prefix"] = work.prefix.place(name)
    if not work.sequential:
        _save_outputs(work, name)
    attention = AttentionSites(block, name, recipe, selected, run, batches, work.gradients)
    rebuilt = recipe.search.reconstruction == "block"
    steps = BlockSteps(work.runner, name, work.mask) if selected and (rebuilt or recipe.transforms.learned) else None
    decided: list[Decided] = []
    replaced: list[Decided] = []  # kept where their float weights are wanted again
    lists = expert_lists(work.model)
    rare = [n for n in selected if n.rpartition(".")[0] in lists]
    later = (partial(run, i) for i in range(1, batches))
    groups = split_sites(shared_inputs(selected, lambda: run(0), rare, later), selected, recipe, rare=rare)
    # an expert's input reaches it in no order that a block's output could teach
    common = [g for g in groups if g[0] not in rare]
    learning = steps is not None and recipe.transforms.learned
    maps = learn_transforms(work.runner, name, common, selected, recipe, steps, work.progress) if steps and learning else {}
    steps = steps if rebuilt else None
    # tokens reach other experts in the float model
    wanted = work.floats.block(name, {g[0]: selected[g[0]] for g in common}) if work.floats is not None else {}
    for wave in waves(groups, rare, recipe):
        attention.decide(wave[0][0], plans, work.sequential)
        decided += work.decide(wave, selected, run, plans, transform=maps.get(wave[0][0]), wanted=wanted.get(wave[0][0]))
        while work.sequential and decided:  # otherwise every site of the block reads what it reads in the float model
            work.replace(site := decided.pop())
            replaced += [site] if rebuilt else []
    attention.decide(None, plans, work.sequential)
    caches, made = decide_caches(block, name, recipe, run, batches, kept_whole(work.model))
    plans |= {"cache": caches} if caches else {}
    place_caches(made)
    for site in decided:
        work.replace(site)
    attention.place()
    if steps:
        reconstruct(work.model, name, replaced + decided, steps, recipe, plans, work.progress)
        for site in replaced + decided:
            work.replace(site)
    if work.sequential:
        _save_outputs(work, name)


def _save_outputs(work: Workspace, name: str) -> None:
    """Store what the block returns as it stands, every rank for its own batches."""
    for i in ranks.mine(len(work.batches)):
        work.store.outputs.save(name, i, work.runner.run(name, i))
    ranks.wait()


def _idle_block(work: Workspace) -> str:
    """Return the next block that the calibration data does not reach; its tensors are copied.

    Raises:
        UnsupportedError: the recipe wants it quantized.
    """
    name = work.runner.idle()[0]
    if wanted := work.selected(work.structure.linears[name]):
        stack = name.rpartition(".")[0]
        raise UnsupportedError(
            f"{next(iter(wanted))} did not run on the calibration data, so it cannot be quantized; "
            f"calibrate on inputs that reach {stack}, or add --ignore '{stack}.*'"
        )
    return name
