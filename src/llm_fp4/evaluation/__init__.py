"""What a model is worth: perplexity, KL divergence to the float model, agreement, zero-shot accuracy, lm-eval."""

from llm_fp4.evaluation.lm_eval import evaluate_tasks
from llm_fp4.evaluation.perplexity import REFERENCE, Metrics, compare, windows
from llm_fp4.evaluation.text import detokenize_wikitext, is_wikitext, read_tokens
from llm_fp4.evaluation.zeroshot import ANSWER, Item, ZeroShot, log_likelihoods, read_items, score_choices

__all__ = [
    "ANSWER", "REFERENCE", "Item", "Metrics", "ZeroShot", "compare", "detokenize_wikitext", "evaluate_tasks",
    "is_wikitext", "log_likelihoods", "read_items", "read_tokens", "score_choices", "windows",
]  # fmt: skip
