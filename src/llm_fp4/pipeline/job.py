"""A quantization run over a model: its units, from the embeddings to the output head, in order, and where it goes on.

Unit 0 holds the token embeddings, then comes a unit a block in the order they run, then the tail. Linears before or between
stacks belong to the unit of the first block after them.
"""

from __future__ import annotations

from functools import partial

from llm_fp4.models import only_new_garbage, set_module, settle, steady
from llm_fp4.pipeline.budget import spend
from llm_fp4.pipeline.choosing import prefix_run
from llm_fp4.pipeline.rotating import rotated
from llm_fp4.pipeline.sites import stored_layer
from llm_fp4.pipeline.units import block_unit, embeddings_unit, tail_unit
from llm_fp4.pipeline.workspace import Workspace


def quantize_units(work: Workspace) -> None:
    """Quantize everything the recipe selects; every finished unit is in the store at once, and is not done again.

    ``work.recipe`` gains what was decided before the first unit: transforms that a rotation needs, widths that a budget buys.
    """
    units = work.store.units
    steady()
    _rotate(work)
    _spend(work)
    work.prefix = prefix_run(
        work.recipe, work.model, work.structure, work.source, work.batches, work.store, work.device, work.progress, work.runner.done,
        partial(work.load_outer, everything=True),
    )  # fmt: skip
    work.progress("quantize", work.store.done, units)
    _resume(work)
    with only_new_garbage():
        for unit in range(work.store.done, units):
            if unit == 0:
                embeddings_unit(work)
            elif unit < units - 1:
                block_unit(work, unit)
            else:
                tail_unit(work, unit)
            settle()
            work.progress("quantize", unit + 1, units)
    for name, module in work.later.items():
        set_module(work.model, name, module)


def _rotate(work: Workspace) -> None:
    """Let weights come rotated from now on, where the recipe says so; the head's are its own then."""
    rules = work.recipe.transforms
    if rules.rotation == "none" or work.store.done == work.store.units:
        return
    source = rotated(work.model, work.structure, work.source, work.batches[0], work.device, work.recipe.seed)
    work.source = source
    work.recipe = work.recipe.with_transformed(source.hidden) if rules.online else work.recipe


def _spend(work: Workspace) -> None:
    """Give every part its width, where the recipe has a budget."""
    if work.recipe.budget is not None:
        work.recipe = spend(
            work.recipe, work.model, work.structure, work.source, work.shapes, work.batches, work.store, work.device, work.progress,
            partial(work.load_outer, everything=True),
        )  # fmt: skip


def _resume(work: Workspace) -> None:
    """Bring the model to where the finished units left it."""
    for unit, plan in enumerate(work.store.plans()[1:], 1):
        if "block" not in plan:
            continue
        work.finish(plan["block"])
        outer = [n for n in plan["weights"] if n in work.structure.outer_linears]
        saved = work.store.saved(unit) if outer else {}
        for name in outer:
            layer = stored_layer(name, plan, saved, work.shapes[name], work.device)
            if work.sequential:
                set_module(work.model, name, layer)
            else:
                work.later[name] = layer
