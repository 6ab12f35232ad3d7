"""Importing the library is cheap and touches no GPU: what is heavy is imported when it is used."""

import json
import subprocess
import sys

import pytest

HEAVY = ["transformers", "typer", "rich", "triton", "datasets", "matplotlib"]

PROBE = """
import json, sys
import torch
before = {name.partition(".")[0] for name in sys.modules}
import MODULE
after = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([sorted(after - before), torch.cuda.is_initialized()]))
"""


def newly_imported(module: str) -> tuple[set[str], bool]:
    """Return the top-level packages that ``module`` imports beyond torch's own, and whether a GPU was touched."""
    code = PROBE.replace("MODULE", module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    packages, touched = json.loads(done.stdout)
    return set(packages), touched


@pytest.mark.parametrize("module", ["llm_fp4", "llm_fp4.numerics", "llm_fp4.plan"])
def test_importing_stays_light(module: str) -> None:
    packages, gpu_touched = newly_imported(module)
    assert "llm_fp4" in packages
    assert packages.isdisjoint(HEAVY)
    assert not gpu_touched


def test_the_probe_sees_an_import() -> None:
    """The check above can fail: the same probe reports a heavy package that is imported."""
    assert "rich" in newly_imported("rich.console")[0]
