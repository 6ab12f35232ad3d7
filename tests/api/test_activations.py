"""Statistics of activations against the same numbers computed at once from hooks on the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_fp4.api import SiteActivations, activation_statistics, draw_activations
from llm_fp4.api.activations import _summary
from llm_fp4.errors import OutputError
from llm_fp4.recipe import Recipe
from llm_fp4.statistics import SiteStatistics, TokenStore


def summary_of(rows: Tensor, folder: Path) -> SiteActivations:
    store = TokenStore(folder / "rows", rows.shape[1])
    store.append(rows)
    return _summary(SiteStatistics("site", store, torch.device("cpu")), ["site"])


def test_variances_add_up_to_that_of_all_values(tmp_path: Path) -> None:
    rows = torch.randn(5000, 16, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 17)  # more than one chunk
    found = summary_of(rows, tmp_path)
    logs = rows.abs().double().log2()
    assert found.inter_channel == pytest.approx(float(logs.mean(0).var(correction=0)))
    assert found.intra_channel == pytest.approx(float(logs.var(0, correction=0).mean()))
    assert found.inter_channel + found.intra_channel == pytest.approx(float(logs.var(correction=0)))
    assert found.intra_channel == pytest.approx(2.567, abs=0.05)  # of a normal distribution, whatever its scale
    assert torch.equal(found.channel_absmax, rows.abs().amax(0))
    assert found.tokens == 5000


def test_zeros_have_no_magnitude(tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, 0.0, 8.0], [4.0, 0.0, 0.0]])
    found = summary_of(rows, tmp_path)
    assert found.intra_channel == pytest.approx(2 / 3)  # channel 0: log2 is 0 and 2, variance 1; channel 2 has one value
    assert found.inter_channel == pytest.approx((2 * (1 - 5 / 3) ** 2 + (3 - 5 / 3) ** 2) / 3)
    assert summary_of(torch.zeros(4, 3), tmp_path).inter_channel == 0


def test_sites_see_what_hooks_on_the_whole_model_see(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    source = tmp_path / "model"
    model.save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("All the sailors sang of the wide sea. " * 30)
    recipe = Recipe.model_validate({"calibration": {"source": str(text), "sequences": 3, "length": 40}, "ignore": ["v_proj"]})
    sites = {s.name: s for s in activation_statistics(source, recipe)}
    assert next(iter(sites)) == "model.layers.0.self_attn.q_proj"
    assert len(sites) == 2 * 4 + 1
    assert sites["model.layers.1.self_attn.q_proj"].operands == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]

    from llm_fp4.calibration import load_tokens

    tokens = load_tokens(text, tiny_tokenizer, sequences=3, length=40, seed=0, model=model)
    seen: dict[str, Tensor] = {}
    for name in sites:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
    with torch.no_grad():
        model(input_ids=tokens)
    for name, site in sites.items():
        torch.testing.assert_close(site.channel_absmax, seen[name].abs().amax(0))
        torch.testing.assert_close(site.channel_quantiles[1], seen[name].abs().quantile(0.5, dim=0))


def test_figures_that_cannot_be_written_are_an_output_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    site = summary_of(torch.randn(50, 8), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        draw_activations([site], tmp_path / "file")
    first, second = (draw_activations([site], tmp_path / name) for name in ("a", "b"))
    assert [p.name for p in first] == ["site.png", "variance.png"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
