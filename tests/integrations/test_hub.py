"""push_to_hub through transformers, to a hub that is a folder of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llm_fp4


class FolderHub:
    """What transformers calls of the hub's API; repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **kwargs: Any) -> Any:
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.root / repo_id / operation.path_in_repo)
        return SimpleNamespace(commit_message=kwargs.get("commit_message"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of repositories that push_to_hub writes to."""
    from huggingface_hub import ModelCard
    from transformers.utils import hub as module

    folder = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(module, "hf_api", lambda: folder)
    # the card that is there already, as the hub would give it
    monkeypatch.setattr(module.ModelCard, "load", lambda name, **kwargs: ModelCard((folder.root / name / "README.md").read_text()))
    return folder.root


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}])
def test_a_checkpoint_goes_to_the_hub_and_back(
    config: dict[str, Any], hub: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama(**config).save_pretrained(tmp_path / "float")
    tiny_tokenizer.save_pretrained(tmp_path / "float")
    tokens = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
    folder = llm_fp4.quantize(tmp_path / "float", tmp_path / "out", "minmax-fp", tokens=tokens)
    (hub / "me" / "tiny-fp4").mkdir(parents=True)
    shutil.copy(folder / "README.md", hub / "me" / "tiny-fp4")
    model = llm_fp4.load(folder)
    model.push_to_hub("me/tiny-fp4", tags=["tiny"])
    pushed = hub / "me" / "tiny-fp4"
    again = llm_fp4.load(pushed)  # which checks every tensor
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    card = (pushed / "README.md").read_text()
    assert "import llm_fp4" in card
    assert "tiny" in card.split("---")[1]


def test_the_card_names_base_and_licence(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    import yaml

    from llm_fp4.models import open_model

    source = tmp_path / "float"
    tiny_llama().save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\nmodel-index: []\n---\n# Tiny\n")
    tokens = torch.randint(2, 258, (2, 32), generator=torch.Generator().manual_seed(0))
    opened = open_model(str(source))
    opened.origin = "someone/tiny"  # as if it had come from the hub
    folders = [
        llm_fp4.quantize(o, tmp_path / n, "minmax-fp", tokens=tokens) for o, n in ((opened, "a"), (source, "b"), (source, "c"))
    ]
    front = yaml.safe_load((folders[0] / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "someone/tiny"
    assert (front["license"], front["language"], front["base_model_relation"]) == ("apache-2.0", ["en"], "quantized")
    assert "model-index" not in front
    cards = [(f / "README.md").read_text() for f in folders]
    assert "base_model" not in cards[1]
    assert cards[1] == cards[2]
    made = [llm_fp4.inspect_model(f).fingerprint for f in folders]
    assert made[1] == made[2]
    assert made[0] is not None
    assert made[1] is not None
    assert made[0]["source"] == {"name": "someone/tiny", **made[1]["source"]}
    other = llm_fp4.quantize(source, tmp_path / "d", "minmax-fp", tokens=tokens + 1)
    changed = llm_fp4.inspect_model(other).fingerprint
    assert changed is not None
    assert [changed[k] == made[1][k] for k in ("source", "recipe", "data", "versions")] == [True, True, False, True]
