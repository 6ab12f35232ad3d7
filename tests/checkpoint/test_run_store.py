"""A run's working directory: one process at a time, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filelock import FileLock

from llm_fp4.checkpoint import RunStore
from llm_fp4.errors import OutputError


def test_a_run_at_work_is_not_joined_by_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    RunStore(folder, {"recipe": "a"}, 2).close()
    with FileLock(folder / "lock"), pytest.raises(OutputError, match="another process is writing"):
        RunStore(folder, {"recipe": "a"}, 2)
    assert RunStore(folder, {"recipe": "a"}, 2).done == 0  # free again


def test_a_refused_run_leaves_the_lock_free(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    store = RunStore(folder, {"recipe": "a"}, 2)
    store.finish(0, {"a": torch.ones(2)}, {})
    store.close()
    with pytest.raises(OutputError, match="another recipe"):
        RunStore(folder, {"recipe": "b"}, 2)
    with FileLock(folder / "lock", timeout=0):
        pass


@pytest.mark.parametrize("damage", ["shard", "output", "plan"])
def test_a_truncated_file_of_an_unfinished_run_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "out.partial"
    store = RunStore(folder, {}, 2)
    store.outputs.save("block", 0, (torch.ones(1, 3, 4), None))
    store.finish(0, {"a": torch.ones(2)}, {"weights": {}, "inputs": {}}, ["block"])
    path = {
        "shard": store.checkpoint / store.shard_name(0),
        "output": folder / "state" / "outputs" / "block" / "00000.safetensors",
        "plan": folder / "state" / "plan-00000.json",
    }[damage]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(OutputError, match=f"{path.name} is damaged.*remove"):
        {"shard": store.weight_map, "output": lambda: store.outputs.load("block", 0), "plan": store.plans}[damage]()


@pytest.mark.parametrize("lost", [None, "[]"])
def test_a_plan_that_is_missing_or_no_object_is_named(tmp_path: Path, lost: str | None) -> None:
    store = RunStore(tmp_path / "out.partial", {}, 2)
    store.finish(0, {"a": torch.ones(2)}, {"weights": {}, "inputs": {}})
    path = store.state / "plan-00000.json"
    path.unlink() if lost is None else path.write_text(lost)
    with pytest.raises(OutputError, match=f"{path.name} is damaged.*remove"):
        store.plans()
