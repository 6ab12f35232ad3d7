"""Calibration: data to token windows, and the inputs of linears gathered while a module runs."""

from llm_fp4.calibration.caches import causal_attentions, collect_cached
from llm_fp4.calibration.collect import collect, inputs_of, shared_inputs, token_rows
from llm_fp4.calibration.gradients import Part, no_parameter_gradients, output_gradients
from llm_fp4.calibration.labelled import TABLES, Labelled, read_labelled
from llm_fp4.calibration.losses import loss_of
from llm_fp4.calibration.media import draw_files, media_files, read_audio, read_image
from llm_fp4.calibration.products import attention_order, collect_product, sequences_sampled
from llm_fp4.calibration.self_text import write_text
from llm_fp4.calibration.sources import check_source, documents
from llm_fp4.calibration.tokens import draw_windows, load_tokens, token_stream

__all__ = [
    "TABLES", "Labelled", "Part", "attention_order", "causal_attentions", "check_source", "collect", "collect_cached", "collect_product",
    "documents", "draw_files", "draw_windows", "inputs_of", "load_tokens", "loss_of", "media_files", "no_parameter_gradients", "output_gradients", "read_audio",
    "read_image", "read_labelled", "sequences_sampled", "shared_inputs", "token_rows", "token_stream", "write_text",
]  # fmt: skip
