"""Tensors and text on disk: read by name over mapped files, written whole or not at all."""

from llm_fp4.storage.read import TensorFiles
from llm_fp4.storage.trees import read_tree, write_tree
from llm_fp4.storage.write import output_error, write_json, write_tensors, write_text

__all__ = ["TensorFiles", "output_error", "read_tree", "write_json", "write_tensors", "write_text", "write_tree"]
