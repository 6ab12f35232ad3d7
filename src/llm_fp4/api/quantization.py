"""Quantizing a model from disk to disk, or one in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_fp4 import ranks
from llm_fp4.api.calibrate import calibration_tokens, whole_float_model
from llm_fp4.api.card import FILE as CARD
from llm_fp4.api.card import model_card
from llm_fp4.api.fisher import gradients_of, model_gradients
from llm_fp4.api.media import source_batches
from llm_fp4.api.prepare import as_batch, checked_device, checked_structure, float32_everywhere, route_attention, token_batches
from llm_fp4.api.provenance import digest, fingerprint, own_version, source_files
from llm_fp4.checkpoint import RunStore, finish_checkpoint
from llm_fp4.errors import CalibrationError, OutputError, UnsupportedError
from llm_fp4.models import Batch, FloatModel, InMemory, Structure, open_model, set_module, weight_shapes
from llm_fp4.nn import CACHE, CHILD, PREFIX, QuantEmbedding, forget_wholes, put_together, share_inputs
from llm_fp4.pipeline import Workspace, parts, quantize_units
from llm_fp4.progress import Progress, silent
from llm_fp4.recipe import Recipe, dump_recipe, load_recipe
from llm_fp4.storage import output_error, write_json, write_text

STAGE = "open the model"


def quantize(
    source: str | Path | FloatModel, out: str | Path, recipe: Recipe | str = "fpq", *, tokens: Tensor | None = None,
    batches: Iterable[Any] | None = None, device: str = "cpu", progress: Progress = silent,
) -> Path:  # fmt: skip
    """Quantize the model ``source`` and return the checkpoint directory ``out``.

    A run that was interrupted is continued by the same call; blocks that were finished are not done again. Several processes
    share one run where each makes the same call within :func:`llm_fp4.ranks.joined`.

    Args:
        source: a hub name, a directory, or a .gguf file; or one already opened.
        recipe: a Recipe, a named recipe or a YAML file.
        tokens: (sequences, length) int64 to calibrate on, instead of the recipe's calibration source.
        batches: model inputs to calibrate on instead, each a mapping of keyword arguments or one tensor for the first
            argument; images and audio as the model's processor makes them. Objective "fisher" takes their "labels".
        device: where the search computes, "cuda" say.
    Raises:
        RecipeError, SourceError, CalibrationError, OutputError: each names the remedy.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    out = Path(os.path.abspath(out))  # "." and ".." have no name to put beside
    work = out.parent / f"{out.name}.partial"
    if ranks.first(lambda: _finished(out, work)):
        return out
    target = checked_device(device)
    progress(STAGE, 0, 1)
    opened = source if isinstance(source, FloatModel) else open_model(str(source))
    structure = checked_structure(opened.model, recipe, opened.source)
    forget_wholes(opened.model)
    progress(STAGE, 1, 1)
    given = None if batches is None else [as_batch(opened.model, b, target) for b in batches]
    if given == []:
        raise CalibrationError("no calibration batches were given; pass an iterable of at least one model input")
    identity = {
        "source": _fingerprint(opened), "recipe": dump_recipe(recipe), "device": target.type,
        "calibration data": _data_digest(recipe, tokens, given), "version of torch or llm-fp4": f"{torch.__version__} {own_version()}",
        "number of threads": torch.get_num_threads(),
    }  # fmt: skip
    store = RunStore(work, identity, len(structure.blocks) + 2)
    with _keeping_what_is_finished(store):
        _fill(store, opened, structure, recipe, tokens, given, out, target, progress)
    return out


def _finished(out: Path, work: Path) -> bool:
    """Return whether an earlier start wrote ``out`` and was killed between the last rename and the clean-up, which is done then.

    Raises:
        OutputError: something else is there.
    """
    if out.exists():
        if work.exists() and not (work / "checkpoint").exists():
            shutil.rmtree(work, ignore_errors=True)
            return True
        raise OutputError(f"{out} exists already; remove it or choose another output")
    return False


def _fill(
    store: RunStore, opened: FloatModel, structure: Structure, recipe: Recipe, tokens: Tensor | None,
    batches: list[Batch] | None, out: Path, target: torch.device, progress: Progress,
) -> None:  # fmt: skip
    """Run what the store lacks and move the finished checkpoint to ``out``."""
    shapes = weight_shapes(opened.model, structure)
    config = {
        **cast(Any, opened.model).config.to_dict(),
        "architectures": [type(opened.model).__name__],
    }  # without quantization_config
    float_bytes = opened.bytes_float
    if batches is None and tokens is None:
        batches = source_batches(opened, recipe, target, lambda: whole_float_model(opened).to(target))
        batches = None if batches is None else [as_batch(opened.model, b, target) for b in batches]
    if batches is None:
        batches = token_batches(opened.model, calibration_tokens(opened, recipe, store, progress, tokens), target)
    gradients = None
    if recipe.search.objective == "fisher":
        if store.gradients() is None:
            store.keep_gradients(model_gradients(opened, structure, recipe, batches, target, progress))
        gradients = store.gradients()
    route_attention(opened.model, recipe)
    with float32_everywhere(opened.model, target):
        work = Workspace(opened.model, structure, opened.source, recipe, batches, store, target, progress, gradients=gradients)
        quantize_units(work)
    if parts(structure, work.recipe) or recipe.transforms.rotation != "none":
        config["tie_word_embeddings"] = False
    description = {"recipe": recipe.name, "method": recipe.method, "bits": recipe.widths}

    def finish() -> None:
        made = fingerprint(opened, recipe, store.tokens() if store.tokens() is not None else tokens, batches)
        card = model_card(opened, description, made, str(config["architectures"][0]))
        whole = {**description, "float_bytes": float_bytes, "fingerprint": made}
        finish_checkpoint(store, out, config, shapes, dump_recipe(recipe), whole, partial(_save_extras, opened, card=card))

    ranks.first(finish)


@contextmanager
def _keeping_what_is_finished(store: RunStore) -> Iterator[None]:
    """Name a full disk in one sentence, and leave nothing behind where nothing was finished.

    A run that failed before its first unit, for want of calibration text say, must not stand in the way of the next.
    """
    try:
        yield
        store.close()
    except BaseException as error:
        store.close()
        if ranks.leads() and store.done == 0 and store.tokens() is None and store.kept("sensitivity") is None:
            shutil.rmtree(store.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise output_error(error, store.folder) from None
        raise


def quantize_module(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe | str = "fpq", *, progress: Progress = silent
) -> nn.Module:
    """Quantize ``model`` in place, calibrated on ``batches``, and return it; an error leaves it as it was.

    Args:
        model: any module with a list of repeated blocks. batches: each a mapping of keyword arguments, or one tensor
            for the first argument.
    Raises:
        CalibrationError: there is no batch. UnsupportedError: no repeated blocks, or no linear the recipe selects.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if recipe.transforms.rotation != "none":
        raise UnsupportedError("transforms.rotation is not implemented for a model in memory; quantize it from its directory")
    try:
        _quantize_in_place(model, batches, recipe, progress)
    except BaseException:
        put_together(model)
        raise
    forget_wholes(model)
    share_inputs(model)
    return model


def _quantize_in_place(model: nn.Module, batches: Iterable[Any], recipe: Recipe, progress: Progress) -> None:
    """Quantize ``model``; an error leaves it as it was, but experts taken apart."""
    structure = checked_structure(model, recipe)
    device = next(model.parameters()).device
    prepared = [as_batch(model, b, device) for b in batches]
    if not prepared:
        raise CalibrationError("no calibration batches were given; pass an iterable of at least one model input")
    dtypes, training = {n: t.dtype for n, t in _all_tensors(model)}, model.training
    originals = {n: model.get_submodule(n) for n in structure.names()}
    model.float().eval()
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        route_attention(model, recipe)
        with float32_everywhere(model, device), tempfile.TemporaryDirectory() as folder:
            store = RunStore(Path(folder), {}, len(structure.blocks) + 2)
            fisher = recipe.search.objective == "fisher"
            gradients = gradients_of(model, structure, recipe, prepared, progress) if fisher else None
            source = InMemory(model)
            quantize_units(
                Workspace(model, structure, source, recipe, prepared, store, device, progress, keep=True, gradients=gradients)
            )
    except BaseException:
        for name, module in originals.items():  # all or nothing
            set_module(model, name, module)
        for module in model.modules():
            module._modules.pop(CHILD, None)
            module._modules.pop(CACHE, None)
            module._modules.pop(PREFIX, None)
        if attention is not None:
            cast(Any, model).set_attn_implementation(attention)
        raise
    finally:
        for name, tensor in _all_tensors(model):  # what was not quantized gets its own dtype back
            if dtypes.get(name, tensor.dtype) != tensor.dtype:
                tensor.data = tensor.data.to(dtypes[name])
        model.train(training)
    for name in (*structure.embeddings, *structure.aliases):
        if isinstance(table := model.get_submodule(name), QuantEmbedding):
            table._dtype = table._dtype.to(dtypes[f"{structure.aliases.get(name, name)}.weight"])
    unseen = recipe.inputs.sinks == "prefix" and not any(PREFIX in m._modules for m in model.modules())
    if unseen and attention is not None:
        cast(Any, model).set_attn_implementation(attention)
    if recipe.cache_formats():
        from llm_fp4.integrations.cache import keep_in_codes

        keep_in_codes(model)
        if attention is not None and not recipe.attention_formats()[0]:  # only to look at what attention multiplies
            cast(Any, model).set_attn_implementation(attention)


def _all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _fingerprint(opened: FloatModel) -> str:
    """Return a digest of what the weights come from: names, sizes and times of the files."""
    digest = hashlib.sha256()
    for file in source_files(opened):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _data_digest(recipe: Recipe, tokens: Tensor | None, batches: list[Batch] | None) -> str:
    """Return what tells one set of calibration data from another: what was given, or the file's size and time."""
    if tokens is not None or batches is not None:
        return digest(batches if batches is not None else [{"tokens": tokens}])
    source = Path(recipe.calibration.source)
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else []
    return " ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files) or recipe.calibration.source


def _save_extras(opened: FloatModel, folder: Path, card: str) -> None:
    write_text(folder / CARD, card)
    if opened.tokenizer is not None:
        opened.tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if opened.gguf is None and (opened.folder / name).is_file():
            shutil.copyfile(opened.folder / name, folder / name)
    stored = opened.folder / "generation_config.json"
    if opened.gguf is None and stored.is_file():
        shutil.copyfile(stored, folder / stored.name)  # as it is: saving it anew refuses what older versions wrote
        return
    generation = getattr(opened.model, "generation_config", None)
    if generation is not None:
        write_json(folder / stored.name, json.loads(generation.to_json_string()))
