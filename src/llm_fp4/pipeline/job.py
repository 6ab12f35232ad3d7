"""A quantization run over a model: its units, from the embeddings to the output head, in order.

Unit 0 holds the token embeddings, then comes a unit a block in the order they run, then the tail. Linears before or between
stacks belong to the unit of the first block after them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_fp4 import ranks
from llm_fp4.calibration import inputs_of, shared_inputs
from llm_fp4.checkpoint import STORED, RunStore
from llm_fp4.errors import UnsupportedError
from llm_fp4.models import Batch, BlockRunner, Structure, WeightSource, embedding_multiplier, kept_whole, set_module, weight_shapes
from llm_fp4.nn import expert_lists
from llm_fp4.numerics import QuantizedTensor
from llm_fp4.pipeline.attention import AttentionSites
from llm_fp4.pipeline.budget import spend
from llm_fp4.pipeline.caches import decide_caches, place_caches
from llm_fp4.pipeline.choosing import prefix_run
from llm_fp4.pipeline.embeddings import lookups, quantize_embedding, selected_embeddings, stored_table
from llm_fp4.pipeline.learning import learn_transforms
from llm_fp4.pipeline.memory import settle
from llm_fp4.pipeline.prefix import PrefixRun
from llm_fp4.pipeline.rotating import rotated
from llm_fp4.pipeline.sampling import token_mask
from llm_fp4.pipeline.sites import Decided, Linears, quantized_layers, selected_linears, split_sites, stored_layer
from llm_fp4.pipeline.tied import Runs, float_head_gram, parts, shared_heads
from llm_fp4.pipeline.waves import Wave, decide_wave, waves
from llm_fp4.plan import ATTENTION_INPUTS, CACHE_TENSORS, PREFIX_TENSORS, FixedWeight, WeightPlan
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import Recipe
from llm_fp4.transforms import InputTransform

PACKED = (*STORED, *(f"{n}_scale" for n in ATTENTION_INPUTS), *CACHE_TENSORS, *PREFIX_TENSORS)  # stored as they are


@dataclass
class Job:
    """One quantization run over a model whose blocks are loaded one at a time.

    Attributes:
        batches: keyword arguments of the model; "attention_mask" (batch, tokens) marks padding.
        gradients: of the float model's loss (see ``calibration.output_gradients``), None where all errors count alike.
        keep: leave every quantized module in the model (an in-memory run); otherwise blocks return to the meta device.
    """

    model: nn.Module
    structure: Structure
    source: WeightSource
    recipe: Recipe
    batches: list[Batch]
    store: RunStore
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    keep: bool = False
    gradients: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.runner = BlockRunner(self.model, self.structure.stacks, self.batches, self.store.outputs.load)
        self.shapes = weight_shapes(self.model, self.structure)
        self.sequential = self.recipe.search.propagation == "sequential"
        self.shared_head = shared_heads(self.structure, self.recipe)
        self.tables: dict[str, QuantizedTensor] = {}  # of an in-memory run
        self.prefix: PrefixRun | None = None
        self.later: dict[str, nn.Module] = {}  # what the float model's own inputs must not see yet

    def run(self) -> None:
        """Quantize everything the recipe selects; every finished unit is in the store at once."""
        units = self.store.units
        self._rotate()
        self._spend()
        self.prefix = self._prefix()
        self.progress("quantize", self.store.done, units)
        self._resume()
        for unit in range(self.store.done, units):
            if unit == 0:
                self._embeddings()
            elif unit < units - 1:
                self._block(unit)
            else:
                self._tail(unit)
            settle()
            self.progress("quantize", unit + 1, units)
        for name, module in self.later.items():
            set_module(self.model, name, module)

    # --- the units ----------------------------------------------------------------------------------

    def _embeddings(self) -> None:
        """Unit 0: quantize the token embeddings."""
        self._load_outer()
        names = selected_embeddings(self.structure, self.recipe)
        tensors: dict[str, Tensor] = {}
        plans: dict[str, Any] = {}
        for name in self.structure.embeddings:
            table = self.model.get_submodule(name)
            if name not in names:
                tensors |= self._tensors(table, name)
                continue
            head = next((h for h, e in self.shared_head.items() if e == name), None)
            gram = self._float_head_gram(head) if head and self.recipe.method.startswith("fpq") else None
            quantized, plans[name] = quantize_embedding(name, table, self.recipe, gram)
            tensors |= {f"{name}.weight_packed": quantized.packed, f"{name}.weight_scale": quantized.scale}
            if self.keep:
                self.tables[name] = quantized
        for alias, owner in self.structure.aliases.items():
            if owner in plans:
                multiplier = embedding_multiplier(self.model.get_submodule(alias))
                plans[alias] = {**plans[owner], "tied_to": owner, "multiplier": multiplier}
            elif parts(self.structure, self.recipe):  # transformers will not tie them any more
                tensors[f"{alias}.weight"] = tensors[f"{owner}.weight"]
        self.store.finish(0, tensors, {"weights": plans, "inputs": {}})

    def _block(self, unit: int) -> None:
        """One block: its sites in the order they run, each collected after those before it were quantized."""
        self._place_embeddings()
        plans: dict[str, Any] = {"weights": {}, "inputs": {}}
        name = self.runner.next_block()
        if name is None:
            name = self._idle_block()
            block = self.source.load(self.model, name, self.device)
        else:
            bridge = self._bridge(name, plans)
            self.runner.check(name)
            block = self.source.load(self.model, name, self.device)
            self._quantize_block(name, plans)
        tensors = self._tensors(block, name)
        for layer in plans.pop("outer", []):
            tensors |= self._tensors(bridge[layer], layer)
        self.runner.finish(name)
        self.store.finish(unit, tensors, {**plans, "block": name}, self.runner.last_blocks())
        if not self.keep:
            self.source.release(self.model, name)

    def _quantize_block(self, name: str, plans: dict[str, Any]) -> None:
        selected = self._selected(self.structure.linears[name])
        run = partial(self.runner.run, name)
        if self.prefix is not None:
            plans["prefix"] = self.prefix.place(name)
        if not self.sequential:
            self._save_outputs(name)
        attention = AttentionSites(
            self.model.get_submodule(name), name, self.recipe, selected, run, len(self.batches), self.gradients
        )
        decided = []
        lists = expert_lists(self.model)
        rare = [n for n in selected if n.rpartition(".")[0] in lists]
        later = (partial(run, i) for i in range(1, len(self.batches)))
        groups = split_sites(shared_inputs(selected, lambda: run(0), rare, later), selected, self.recipe, rare=rare)
        common = [
            g for g in groups if g[0] not in rare
        ]  # an expert's input reaches it in no order that a block's output could teach
        learned = self.recipe.transforms.learned
        maps = learn_transforms(self.runner, name, common, selected, self.recipe, self._mask) if learned else {}
        for wave in waves(groups, rare, self.recipe):
            attention.decide(wave[0][0], plans, self.sequential)
            decided += self._decide(wave, selected, run, plans, transform=maps.get(wave[0][0]))
            while self.sequential and decided:  # otherwise every site of the block reads what it reads in the float model
                self._replace(decided.pop())
        attention.decide(None, plans, self.sequential)
        caches, made = decide_caches(
            self.model.get_submodule(name), name, self.recipe, run, len(self.batches), kept_whole(self.model)
        )
        plans |= {"cache": caches} if caches else {}
        place_caches(made)
        for site in decided:
            self._replace(site)
        attention.place()
        if self.sequential:
            self._save_outputs(name)

    def _save_outputs(self, name: str) -> None:
        for i in ranks.mine(len(self.batches)):
            self.store.outputs.save(name, i, self.runner.run(name, i))
        ranks.wait()

    def _bridge(self, name: str, plans: dict[str, Any]) -> Linears:
        """Quantize the linears outside the blocks that run before the block ``name``; return the quantized ones."""
        if not name.endswith(".0"):
            return {}
        selected = self._selected(self.structure.outer_linears, head=True)
        groups = shared_inputs(selected, lambda: self.runner.tail(0))  # it stops at ``name``
        ran = {n: selected[n] for group in groups for n in group}
        found: Linears = {}
        for group in split_sites(groups, ran, self.recipe, head=True):
            (site,) = self._decide([group], ran, self.runner.tail, plans, head=True)
            layers = quantized_layers(site)
            found |= layers
            for layer, module in layers.items() if self.sequential else ():
                set_module(self.model, layer, module)
        self.later |= {} if self.sequential else found
        plans["outer"] = list(found)
        return found

    def _idle_block(self) -> str:
        """Return the next block that the calibration data does not reach; its tensors are copied.

        Raises:
            UnsupportedError: the recipe wants it quantized.
        """
        name = self.runner.idle()[0]
        if wanted := self._selected(self.structure.linears[name]):
            stack = name.rpartition(".")[0]
            raise UnsupportedError(
                f"{next(iter(wanted))} did not run on the calibration data, so it cannot be quantized; "
                f"calibrate on inputs that reach {stack}, or add --ignore '{stack}.*'"
            )
        return name

    def _tail(self, unit: int) -> None:
        """The last unit: linears after the blocks, the output head among them."""
        self._place_embeddings()
        early = {n for plan in self.store.plans() for n in plan["weights"] if n in self.structure.outer_linears}
        selected = self._selected([n for n in self.structure.outer_linears if n not in early], head=True)
        self._load_outer(everything=True)
        plans: dict[str, Any] = {"weights": {}, "inputs": {}}
        if selected:
            self.runner.check(None, lambda run: inputs_of(selected, run))
        for group in split_sites(shared_inputs(selected, lambda: self.runner.tail(0)), selected, self.recipe, head=True):
            for site in self._decide([group], selected, self.runner.tail, plans, head=True):
                self._replace(site)
        tensors = self._tensors(self.model, "")
        apart = (*self.structure.blocks, *self.structure.embeddings, *self.structure.aliases, *early)
        shared = {f"{h}.{t}" for h in self.shared_head for t in ("weight_packed", "weight_scale")}
        packed = selected_embeddings(self.structure, self.recipe)
        # a float head or table tied to a float embedding is that embedding's tensor
        shared |= {f"{h}.weight" for h, e in self.structure.tied.items() if e not in packed}
        tensors = {n: t for n, t in tensors.items() if n not in shared and not n.startswith(tuple(f"{m}." for m in apart))}
        self.store.finish(unit, tensors, plans)

    def _rotate(self) -> None:
        """Let weights come rotated from now on, where the recipe says so; the head's are its own then."""
        rules = self.recipe.transforms
        if rules.rotation == "none" or self.store.done == self.store.units:
            return
        self.source = source = rotated(self.model, self.structure, self.source, self.batches[0], self.device, self.recipe.seed)
        self.recipe = self.recipe.with_transformed(source.hidden) if rules.online else self.recipe

    def _spend(self) -> None:
        """Give every part its width, where the recipe has a budget."""
        if self.recipe.budget is None:
            return
        self.recipe = spend(
            self.recipe, self.model, self.structure, self.source, self.shapes, self.batches, self.store, self.device, self.progress,
            lambda: self._load_outer(everything=True),
        )  # fmt: skip
        self.shared_head = shared_heads(self.structure, self.recipe)

    def _prefix(self) -> PrefixRun | None:
        """Return what gives every block the prefix that takes the part of the attention sink, where the recipe wants one."""
        return prefix_run(
            self.recipe, self.model, self.structure, self.source, self.batches, self.store, self.device, self.progress,
            self.runner.done, lambda: self._load_outer(everything=True),
        )  # fmt: skip

    # --- helpers ------------------------------------------------------------------------------------

    def _selected(self, names: list[str], head: bool = False) -> Linears:
        """Return those of the linears ``names`` that the recipe quantizes and that still are float."""
        return selected_linears(self.model, [n for n in names if n not in self.later], self.recipe, head)

    def _decide(
        self, wave: Wave, selected: Linears, run: Callable[[int], object], plans: dict[str, Any], head: bool = False,
        transform: InputTransform | None = None,
    ) -> list[Decided]:  # fmt: skip
        shared = {n: self.shared_head[n] for group in wave for n in group if head and n in self.shared_head}
        fixed = {n: self._stored_embedding(n, embedding) for n, embedding in shared.items()}
        decided = decide_wave(
            wave,
            selected,
            self._runs(run),
            self.recipe,
            fixed,
            plans,
            self.store.scratch,
            self.device,
            head,
            transform,
            self.gradients,
        )
        for n, embedding in shared.items():
            plans["weights"][n]["tied_to"] = embedding
        return decided

    def _replace(self, site: Decided) -> None:
        for name, layer in quantized_layers(site).items():
            set_module(self.model, name, layer)

    def _stored_embedding(self, head: str, embedding: str) -> FixedWeight:
        """Return the weight of a head that shares its embedding's codes, read back from the first unit."""
        rows = stored_table(self.store.plans()[0]["weights"][embedding], self.store.saved(0), embedding, self.shapes[embedding])
        scale = rows.scale.to(self.device)
        return FixedWeight(WeightPlan(head, rows.format, scale), rows.dequantize().to(self.device))

    def _runs(self, run: Callable[[int], object]) -> Runs:
        """Return ``run`` of every batch, with the batch's mask."""
        return [(partial(run, i), self._mask(i)) for i in range(len(self.batches))]

    def _mask(self, i: int) -> Tensor | None:
        return token_mask(self.batches[i], self.runner)

    def _float_head_gram(self, head: str) -> Tensor:
        return float_head_gram(
            head, self.model, self.structure, self.source, self.batches, self.store.scratch, self._runs, self.device,
            self.recipe.seed, self.progress,
        )  # fmt: skip

    def _load_outer(self, everything: bool = False) -> None:
        """Make every parameter outside the blocks real; tied heads and tables only where ``everything`` is wanted."""
        without = (*self.structure.blocks, *(() if everything else (*self.structure.tied, *self.structure.aliases)))
        self.source.load(self.model, "", self.device, lambda n: not n.startswith(tuple(f"{b}." for b in without)))
        for alias, owner in self.structure.aliases.items():
            table = self.model.get_submodule(alias)
            if isinstance(table, nn.Embedding):  # until it is exchanged, too
                table.weight = self.model.get_submodule(owner).weight  # type: ignore[assignment]

    def _place_embeddings(self) -> None:
        """Let embeddings be read from the disk where they lie there: quantized ones, unless inputs are the float model's."""
        if not self.keep or (self.sequential and self.tables):
            saved = self.store.saved(0) if not self.keep else {}
            plans = self.store.plans()[0]["weights"]

            def packed(name: str) -> QuantizedTensor | None:
                if name not in plans or not self.sequential:
                    return None
                return self.tables[name] if self.keep else stored_table(plans[name], saved, name, self.shapes[name])

            for name, module in lookups(self.model, self.structure, self.source, packed, self.device).items():
                set_module(self.model, name, module)
        elif self.tables:
            found = lookups(self.model, self.structure, self.source, lambda n: self.tables.get(n), self.device)
            self.later |= found
        self.tables = {}
        self._load_outer()

    def _resume(self) -> None:
        """Bring the model to where the finished units left it."""
        for unit, plan in enumerate(self.store.plans()[1:], 1):
            if "block" not in plan:
                continue
            self.runner.finish(plan["block"])
            outer = [n for n in plan["weights"] if n in self.structure.outer_linears]
            saved = self.store.saved(unit) if outer else {}
            for name in outer:
                layer = stored_layer(name, plan, saved, self.shapes[name], self.device)
                if self.sequential:
                    set_module(self.model, name, layer)
                else:
                    self.later[name] = layer

    def _tensors(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Return what the checkpoint holds of ``module``: packed tensors as they are, the rest in the source's dtype."""
        prefix = f"{name}." if name else ""
        state = module.state_dict(prefix=prefix)
        folded = {f"{prefix}{n}.bias" if n else f"{prefix}bias" for n, m in module.named_modules() if getattr(m, "folded", False)}
        kept = {k for k in state if k.rpartition(".")[2] in PACKED or k in folded}
        return {k: t if k in kept else t.to(self.source.dtype(k)) for k, t in state.items()}
