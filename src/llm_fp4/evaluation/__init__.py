"""What a model is worth: perplexity, KL divergence to the float model, agreement, zero-shot accuracy, lm-eval."""

from llm_fp4.evaluation.classes import TopK, class_logits, top_k
from llm_fp4.evaluation.clipping import Clipped, clipping_sentence, watch_clipping
from llm_fp4.evaluation.labelled import class_metrics, class_numbers, score_metrics, sentence_vectors, similarities
from llm_fp4.evaluation.lm_eval import evaluate_tasks
from llm_fp4.evaluation.perplexity import REFERENCE, Metrics, compare, windows
from llm_fp4.evaluation.speech import read_transcripts, transcribe, word_error_rate
from llm_fp4.evaluation.text import detokenize_wikitext, is_wikitext, read_tokens
from llm_fp4.evaluation.zeroshot import ANSWER, Item, ZeroShot, log_likelihoods, read_items, score_choices

__all__ = [
    "ANSWER", "REFERENCE", "Clipped", "Item", "Metrics", "TopK", "ZeroShot", "class_logits", "class_metrics", "class_numbers", "clipping_sentence", "compare",
    "detokenize_wikitext", "evaluate_tasks", "is_wikitext", "log_likelihoods", "read_items", "read_tokens", "read_transcripts", "score_choices",
    "score_metrics", "sentence_vectors", "similarities", "top_k", "transcribe", "watch_clipping", "windows", "word_error_rate",
]  # fmt: skip
