"""What a run has finished, on disk: one shard and one plan a unit, and the outputs that later units read.

A unit is the embeddings, one block, or the tail with the output head. A run killed anywhere goes on after its last
finished unit: everything of a unit is written first, then ``progress.json`` moves on in one step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llm_fp4 import ranks
from llm_fp4.checkpoint.outputs import BlockOutputs
from llm_fp4.errors import OutputError
from llm_fp4.storage import output_error, write_json, write_tensors

_LOCK = "lock"
_OWN = {"state", "checkpoint", "scratch", "run.json", ".run.json.tmp", _LOCK}


class RunStore:
    """The working directory of one run, which holds it locked until :meth:`close`; of several ranks the first writes.

    Args:
        folder: created if it is not there. fingerprint: what must be equal for the run to be continued.
        units: how many units the run has. shards: False keeps no tensors (of a run that only looks at the model).
    Raises:
        OutputError: the folder belongs to a run with another fingerprint or to one at work, or cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], units: int, shards: bool = True) -> None:
        self.folder, self.units, self._shards = folder, units, shards
        self.state, self.checkpoint = folder / "state", folder / "checkpoint"
        self._lock = FileLock(folder / _LOCK, timeout=0, is_singleton=True)  # the system frees it if the process dies
        ranks.first(lambda: self._take(fingerprint))
        self.done: int = _json(self.state / "progress.json").get("done", 0)
        self.outputs = BlockOutputs(self.state / "outputs")

    def _take(self, fingerprint: dict[str, Any]) -> None:
        """Lock the folder, and continue the run it holds or begin one."""
        folder = self.folder
        strange = folder.is_dir() and not (folder / "run.json").is_file()
        if strange and (names := sorted({p.name for p in folder.iterdir()} - _OWN)):
            raise OutputError(f"{folder} holds {names[0]}, which no run of llm-fp4 wrote; remove it or choose another output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise OutputError(f"another process is writing {folder}; wait for it or choose another output") from None
        except OSError as error:
            raise output_error(error, folder) from None
        try:
            self._open(fingerprint)
        except BaseException:
            self.close()
            raise

    def _open(self, fingerprint: dict[str, Any]) -> None:
        """Continue the run that ``folder`` holds, or begin one."""
        identity, progress = self.folder / "run.json", self.state / "progress.json"
        found, finished = _json(identity), _json(progress).get("done", 0)
        if not found:
            self._clear()  # what is left of a run killed while it began or was cleared away
            finished = 0
        elif different := sorted(k for k in {*found, *fingerprint} if found.get(k) != fingerprint.get(k)):
            if finished:
                raise OutputError(
                    f"{self.folder} holds an unfinished run with another {', '.join(different)}; remove it or choose another output"
                )
            self._clear()  # nothing is lost: that run had finished nothing
        try:
            self.state.mkdir(exist_ok=True)
            self.checkpoint.mkdir(exist_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
        except OSError as error:
            raise output_error(error, self.folder) from None
        write_json(identity, fingerprint)

    def _clear(self) -> None:
        """Remove everything but the lock."""
        (self.folder / "run.json").unlink(missing_ok=True)
        for own in (self.state, self.checkpoint, self.scratch):
            shutil.rmtree(own, ignore_errors=True)

    def close(self) -> None:
        """Let other processes continue the run."""
        self._lock.release()

    @property
    def scratch(self) -> Path:
        """A folder for the unit at work, emptied at every start."""
        return self.folder / "scratch"

    def shard_name(self, unit: int) -> str:
        """Return the file name of a unit's shard, as transformers numbers them."""
        return f"model-{unit + 1:05d}-of-{self.units:05d}.safetensors"

    def finish(self, unit: int, tensors: dict[str, Tensor], plan: dict[str, Any], keep: Collection[str] = ()) -> None:
        """Write the unit's shard and plan, then mark it finished; of the outputs only those of the blocks ``keep`` stay."""
        ranks.first(lambda: self._write(unit, tensors, plan, keep))
        self.done = unit + 1

    def _write(self, unit: int, tensors: dict[str, Tensor], plan: dict[str, Any], keep: Collection[str]) -> None:
        if self._shards:
            write_tensors(self.checkpoint / self.shard_name(unit), tensors)
        write_json(self.state / f"plan-{unit:05d}.json", plan)
        write_json(self.state / "progress.json", {"done": unit + 1})
        self.outputs.keep(keep)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def keep_tokens(self, tokens: Tensor) -> None:
        """Store the calibration tokens of the run."""
        write_tensors(self.state / "tokens.safetensors", {"tokens": tokens})

    def tokens(self) -> Tensor | None:
        """Return the calibration tokens stored earlier, or None."""
        path = self.state / "tokens.safetensors"
        return _tensors(path, self.folder)["tokens"] if path.is_file() else None

    def keep_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Store the gradients of the float model."""
        write_tensors(self.state / "gradients.safetensors", gradients)

    def gradients(self) -> dict[str, Tensor] | None:
        """Return the gradients stored earlier, over the file's pages, or None."""
        path = self.state / "gradients.safetensors"
        return _tensors(path, self.folder) if path.is_file() else None

    def keep(self, name: str, data: dict[str, Any]) -> None:
        """Store what was decided before the first unit."""
        ranks.first(lambda: write_json(self.state / f"{name}.json", data))

    def kept(self, name: str) -> dict[str, Any] | None:
        """Return what :meth:`keep` stored under ``name``, or None."""
        return _json(self.state / f"{name}.json") or None

    def plans(self) -> list[dict[str, Any]]:
        """Return the plans of all finished units, in order."""
        return [self._plan(unit) for unit in range(self.done)]

    def _plan(self, unit: int) -> dict[str, Any]:
        path = self.state / f"plan-{unit:05d}.json"
        if not path.is_file():
            raise _damaged(path, self.folder)
        return _json(path)

    def weight_map(self) -> dict[str, str]:
        """Return tensor name → shard of every finished shard."""
        found = {}
        for unit in range(self.done):
            shard = self.checkpoint / self.shard_name(unit)
            try:
                with safe_open(shard, "pt") as handle:
                    found.update(dict.fromkeys(handle.keys(), shard.name))
            except (SafetensorError, OSError):
                raise _damaged(shard, self.folder) from None
        return found

    def saved(self, unit: int) -> dict[str, Tensor]:
        """Return the tensors of a finished unit's shard."""
        return _tensors(self.checkpoint / self.shard_name(unit), self.folder)


def _damaged(path: Path, folder: Path) -> OutputError:
    return OutputError(f"{path} is damaged, so the unfinished run cannot be continued; remove {folder} and start again")


def _tensors(path: Path, folder: Path) -> dict[str, Tensor]:
    """Return the tensors in ``path``, a file of the run in ``folder``.

    Raises:
        OutputError: the file is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError):
        raise _damaged(path, folder) from None
    return tensors


def _json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``, empty where there is no such file.

    Raises:
        OutputError: the file is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise _damaged(path, path.parent)
    return data
