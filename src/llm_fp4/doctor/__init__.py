"""Is a quantized checkpoint sound? Ours, compressed-tensors', ModelOpt's or a GGUF file, and what to do where it is not."""

from llm_fp4.doctor.examine import diagnose
from llm_fp4.doctor.findings import CHECKS, Diagnosis, Finding

__all__ = ["CHECKS", "Diagnosis", "Finding", "diagnose"]
