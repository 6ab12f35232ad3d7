"""Each way to break a checkpoint is seen and named; sound ones get a clean bill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from breaking import change

from llm_fp4.doctor import CHECKS, Diagnosis, diagnose
from llm_fp4.errors import CheckpointError, UnsupportedError

Tensors = dict[str, torch.Tensor]
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
GOOD = [
    ("rows", "ours"), ("nvfp4", "ours"), ("mxfp4", "ours"), ("int4", "ours"), ("nvfp4", "compressed-tensors"), ("mxfp4", "compressed-tensors"),
    ("int4", "compressed-tensors"), ("rows", "compressed-tensors"), ("nvfp4", "modelopt"),
]  # fmt: skip


def wrong(found: Diagnosis) -> set[str]:
    return {f.check for f in found.findings if f.wrong}


@pytest.mark.parametrize(("kind", "target"), GOOD)
def test_a_sound_checkpoint_gets_a_clean_bill(kind: str, target: str, sound: Callable[..., Path], float_model: Path) -> None:
    folder = sound(kind, target)
    found = diagnose(folder)
    assert not found.wrong, found.findings
    assert sum(found.weights.values()) >= 14
    fp8 = (kind, target) == ("rows", "compressed-tensors")  # a byte a code: no nibbles
    assert any("nibble order: as declared" in k for k in found.known) != fp8
    compared = diagnose(folder, float_model)
    assert not compared.wrong, compared.findings
    assert any("compared with the reference" in k for k in compared.known)


def exchanged(packed: torch.Tensor) -> torch.Tensor:
    data = packed.contiguous().view(torch.uint8)
    return ((data << 4) | (data >> 4)).view(packed.dtype)


def swap(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith("weight_packed") or (n.endswith("weight") and tensors[n].dtype == torch.uint8)]:
        tensors[name] = exchanged(tensors[name])


@pytest.mark.parametrize(("kind", "target"), [g for g in GOOD if g != ("rows", "compressed-tensors")])
@pytest.mark.parametrize("compared", [False, True])
def test_the_order_of_nibbles(kind: str, target: str, compared: bool, sound: Callable[..., Path], float_model: Path) -> None:
    folder = sound(kind, target)
    change(folder, swap)
    found = diagnose(folder, float_model if compared else None)
    assert wrong(found) == {"nibble order"}
    (finding,) = (f for f in found.findings if f.wrong)
    assert "exchanged" in finding.seen
    assert len(finding.where) == (14 if compared else 2) + (kind == "rows" and compared)  # the embedding, too


def set_to(name: str, value: float, rows: slice | int = 3) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensor = tensors[name].float()
        if tensor.dim():
            tensor[rows] = value
        else:
            tensor.fill_(value)
        tensors[name] = tensor.to(tensors[name].dtype)

    return edit


def scaled(suffix: str, edit: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> Callable[[Tensors], None]:
    def change_all(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(suffix) and only in n]:
            tensors[name] = edit(tensors[name].float()).to(tensors[name].dtype)

    return change_all


def codes(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """Return a change of the nibbles of one weight."""

    def change_codes(tensors: Tensors) -> None:
        packed = tensors[f"{UP}.weight_packed"]
        low, high = edit(packed & 0xF), edit(packed >> 4)
        tensors[f"{UP}.weight_packed"] = low | (high << 4)

    return change_codes


CT = "compressed-tensors"
BROKEN: dict[str, tuple[str, str, Callable[[Tensors], Tensors | None], str]] = {
    "divisor for factor": ("nvfp4", CT, scaled("weight_global_scale", lambda t: 1 / t), "global scale inverted"),
    "factor for divisor": ("nvfp4", "modelopt", scaled("weight_scale_2", lambda t: 1 / t), "global scale inverted"),
    "row scales inverted": ("rows", "ours", scaled(".weight_scale", lambda t: 1 / t, "layers"), "scale inverted"),
    "input scales inverted": ("nvfp4", CT, scaled("input_global_scale", lambda t: 1 / t * 2.0**-14), "input scale inverted"),
    "unequal siblings": ("nvfp4", CT, scaled("q_proj.weight_global_scale", lambda t: t * 2), "fused siblings"),
    "unequal inputs": ("nvfp4", "modelopt", scaled("up_proj.input_scale", lambda t: t * 2), "fused siblings"),
    "zero": ("rows", "ours", set_to(f"{UP}.weight_scale", 0.0), "scale zero"),
    "zero block": ("nvfp4", CT, set_to(f"{UP}.weight_scale", 0.0), "scale zero"),
    "zero global": ("nvfp4", "modelopt", set_to(f"{UP}.weight_scale_2", 0.0), "scale zero"),
    "NaN": ("nvfp4", CT, set_to(f"{UP}.weight_scale", float("nan")), "scale NaN"),
    "NaN of a power of two": ("mxfp4", CT, set_to(f"{UP}.weight_scale", 255), "scale NaN"),
    "infinite": ("rows", "ours", set_to(f"{UP}.weight_scale", float("inf")), "scale infinite"),
    "infinite global": ("nvfp4", CT, set_to(f"{UP}.weight_global_scale", 0.0, 0), "scale infinite"),
    "negative": ("nvfp4", CT, scaled("up_proj.weight_scale", lambda t: -t, "layers.0"), "scale negative"),
    "underflow": ("nvfp4", CT, scaled("up_proj.weight_scale", lambda t: t * 2.0**-14, "layers.0"), "scale underflow"),
    "far from the others": ("mxfp4", CT, scaled("up_proj.weight_scale", lambda t: t + 40, "layers.0"), "magnitude"),
    "input scale of zero": ("rows", "ours", set_to(f"{UP}.input_scale", 0.0), "input scale"),
    "missing scale": ("nvfp4", CT, lambda t: {n: v for n, v in t.items() if n != f"{UP}.weight_scale"}, "missing tensor"),
    "missing global": ("nvfp4", CT, lambda t: {n: v for n, v in t.items() if n != f"{UP}.weight_global_scale"}, "missing tensor"),
    "missing, ours": ("rows", "ours", lambda t: {n: v for n, v in t.items() if n != f"{UP}.weight_packed"}, "missing tensor"),
    "fewer blocks": ("nvfp4", CT, lambda t: t | {f"{UP}.weight_scale": t[f"{UP}.weight_scale"][:, :-1].contiguous()}, "shape"),
    "fewer rows": ("rows", "ours", lambda t: t | {f"{UP}.weight_scale": t[f"{UP}.weight_scale"][:-1].contiguous()}, "shape"),
    "skipped": (
        "nvfp4", CT, lambda t: {n: v for n, v in t.items() if not n.startswith(UP)} | {f"{UP}.weight": torch.ones(256, 64)}, "skipped layer",
    ),
    "saturated": ("rows", "ours", codes(lambda c: torch.where(c & 7 > 1, c | 7, c)), "codes saturated"),
    "all zero": ("rows", "ours", codes(lambda c: c & 8), "codes all zero"),
    "unused": ("rows", "ours", codes(lambda c: torch.where(c & 7 == 5, c ^ 1, c)), "codes unused"),
    "two's complement": (
        "rows", "ours", codes(lambda c: torch.where(c & 8 > 0, (16 - (c & 7).int()).to(torch.uint8) & 15, c)), "codes not sign-magnitude",
    ),
    "offset": ("rows", "ours", codes(lambda c: torch.where(c & 8 > 0, 8 - (c & 7), c + 8)), "codes not sign-magnitude"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(case: str, sound: Callable[..., Path]) -> None:
    kind, target, edit, check = BROKEN[case]
    folder = sound(kind, target)
    change(folder, edit)
    if case == "skipped":  # on no list
        config = json.loads((folder / "config.json").read_text())
        (group,) = config["quantization_config"]["config_groups"].values()
        group["targets"] = ["Linear"]
        (folder / "config.json").write_text(json.dumps(config))
    found = diagnose(folder)
    assert check in wrong(found), found.findings
    finding = next(f for f in found.findings if f.check == check)
    assert finding.remedy == CHECKS[check][1]
    several = "layers" in case or "siblings" in case or "inputs" in case or "verted" in check
    assert several or finding.where == [UP], finding


@pytest.mark.parametrize(
    ("edit", "check"),
    [
        (scaled("weight_global_scale", lambda t: 1 / t), "global scale inverted"),
        (scaled("weight_scale", lambda t: 8 / t), "scale inverted"),
        (lambda t: t | {f"{UP}.weight_packed": t[f"{UP}.weight_packed"].flip(0)}, "unlike the reference"),
        (lambda t: t | {f"{UP}.weight_global_scale": t[f"{UP}.weight_global_scale"] * 16}, "magnitude"),
    ],
)
def test_a_reference_tells_more(
    edit: Callable[[Tensors], Tensors | None], check: str, sound: Callable[..., Path], float_model: Path
) -> None:
    folder = sound("nvfp4", CT)
    change(folder, edit)
    assert check in wrong(diagnose(folder, float_model))


def test_notes_make_nothing_wrong(sound: Callable[..., Path]) -> None:
    folder = sound("rows")
    change(folder, codes(lambda c: torch.where(c == 0, 8, c)))
    found = diagnose(folder)
    assert not found.wrong
    assert [(f.check, f.where) for f in found.findings] == [("negative zero", [UP])]
    assert found.codes["E2M1"][8] > 0
    folder.joinpath("config.json").rename(folder / "kept.json")
    with pytest.raises(UnsupportedError, match="no quantization_config"):
        diagnose(folder)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        diagnose(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UnsupportedError, match="quantized by 'awq'; llm-fp4, compressed-tensors, ModelOpt and GGUF"):
        diagnose(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"no \.gguf file"):
        diagnose(tmp_path / "model.bin")


def test_a_trained_model_tells_its_order(shared_data: Path, tmp_path: Path) -> None:
    import llm_fp4

    source = shared_data / "models" / "stories260k"
    folder = llm_fp4.quantize(source, tmp_path / "out", "minmax-fp", tokens=torch.randint(3, 500, (2, 32)))
    assert any("nibble order: as declared" in k for k in diagnose(folder).known)
    change(folder, swap)
    assert wrong(diagnose(folder)) == {"nibble order"}
