"""Examining a checkpoint: open it, measure every weight once, and ask each check."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from llm_fp4.checkpoint import METHOD
from llm_fp4.doctor.findings import Diagnosis, Problem, collected
from llm_fp4.doctor.floats import FloatWeights
from llm_fp4.doctor.gguf_file import GgufFile
from llm_fp4.doctor.measures import Measures, measure
from llm_fp4.doctor.numbers import code_problems, magnitude_problems, scale_problems
from llm_fp4.doctor.order import evidence, order_problems
from llm_fp4.doctor.ours import Ours
from llm_fp4.doctor.peers import Peer, peer_config
from llm_fp4.doctor.reference import reference_problems
from llm_fp4.doctor.siblings import input_problems, layer_problems, sibling_problems
from llm_fp4.doctor.stored import Checkpoint
from llm_fp4.errors import CheckpointError, UnsupportedError
from llm_fp4.models import open_model
from llm_fp4.progress import Progress, silent

STAGE = "examine the weights"


def diagnose(path: str | Path, reference: str | Path | None = None, *, progress: Progress = silent) -> Diagnosis:
    """Return what is wrong with a quantized checkpoint, and what could be told of it.

    Args:
        path: a directory of llm-fp4, compressed-tensors or ModelOpt (NVFP4), or a .gguf file.
        reference: the float model it was made from; without it, some mistakes cannot be told from their opposite.
    Raises:
        CheckpointError: there is no such checkpoint, or its files are damaged. UnsupportedError: another kind of checkpoint.
        SourceError: the reference cannot be opened.
    """
    checkpoint = opened(Path(path))
    exact = None if reference is None else FloatWeights(open_model(str(reference)), checkpoint)
    changed = checkpoint.transformed() if isinstance(checkpoint, Ours) else set()
    result = Diagnosis(str(path), checkpoint.kind)
    problems: list[Problem] = []
    measured: dict[str, Measures] = {}
    counts: dict[str, Tensor] = {}
    for done, weight in enumerate(checkpoint.weights()):
        progress(STAGE, done, done + 1)
        m = measured[weight.name] = measure(weight)
        scales = list(scale_problems(m))
        problems += scales
        if exact is not None and weight.name not in changed:
            problems += reference_problems(weight, exact(weight.name))
        elif not any(p.check in ("scale NaN", "scale infinite", "scale zero") for p in scales):
            problems += magnitude_problems(m, "emb" in weight.name)
        problems += code_problems(m)
        counts[weight.kind] = counts.get(weight.kind, torch.zeros_like(m.counts)) + m.counts
    progress(STAGE, len(measured), len(measured))
    problems += (
        sibling_problems(measured, checkpoint.layers, isinstance(checkpoint, Ours)) if not isinstance(checkpoint, GgufFile) else []
    )
    problems += [*input_problems(measured), *layer_problems(measured, checkpoint.layers)]
    wrong, told = order_problems([] if exact is not None else list(evidence(measured)))
    problems += wrong
    result.findings = collected([*checkpoint.problems, *problems])
    result.weights = dict(Counter(m.weight.kind for m in measured.values()))
    result.codes = {kind: c.tolist() for kind, c in counts.items() if len(c) <= 16}
    result.known = [*(_told(exact is not None, changed, told) if measured else ["no weight could be examined"]), *checkpoint.unread]
    return result


def _told(compared: bool, changed: set[str], order: str) -> list[str]:
    if not compared:
        return [
            order,
            "scales: judged by the usual magnitude of weights; whether each value is right needs the float model (--reference)",
        ]
    sentences = ["nibble order, scales and values: compared with the reference"]
    if changed:
        sentences.append(f"{len(changed)} layers were changed together with their inputs, and not compared")
    return sentences


def opened(path: Path) -> Checkpoint:
    """Return the checkpoint at ``path``, its headers read.

    Raises:
        CheckpointError: nothing is there, or it is damaged. UnsupportedError: it is of a kind that is not examined.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedError(f"{path} is no .gguf file; name one, or a directory of a quantized model")
        return GgufFile(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; name a directory of a quantized model, or a .gguf file")
    if not (config := peer_config(path)):
        raise UnsupportedError(f"{path} is not quantized: its config.json has no quantization_config")
    method = config.get("quant_method")
    if method == METHOD:
        return Ours(path)
    if method not in ("compressed-tensors", "modelopt"):
        raise UnsupportedError(f"{path} is quantized by {method!r}; llm-fp4, compressed-tensors, ModelOpt and GGUF are examined")
    return Peer(path, config)
