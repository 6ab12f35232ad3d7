"""Checkpoints: the manifest, the store of a run that can be continued, and the finished directory."""

from llm_fp4.checkpoint.attention import read_attention, read_caches
from llm_fp4.checkpoint.finish import finish_checkpoint
from llm_fp4.checkpoint.manifest import (
    METHOD,
    STORED,
    VERSION,
    Manifest,
    ModuleEntry,
    manifest_of_plans,
    read_config,
    read_manifest,
    read_plan,
    site_spec,
    verify,
)
from llm_fp4.checkpoint.outputs import BlockOutputs
from llm_fp4.checkpoint.run_store import RunStore

__all__ = [
    "METHOD", "STORED", "VERSION", "BlockOutputs", "Manifest", "ModuleEntry", "RunStore", "finish_checkpoint", "manifest_of_plans",
    "read_attention", "read_caches", "read_config", "read_manifest", "read_plan", "site_spec", "verify",
]  # fmt: skip
