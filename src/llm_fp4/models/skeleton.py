"""Opening a float model: a directory, a hub name or a GGUF file becomes a model whose weights may still be on disk."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_fp4.errors import LlmFp4Error, SourceError
from llm_fp4.models.gguf_header import check_gguf
from llm_fp4.models.memory import steady
from llm_fp4.models.sizes import check_sizes
from llm_fp4.models.source import InMemory, LazyFiles, WeightSource
from llm_fp4.storage import TensorFiles


@dataclass
class FloatModel:
    """A float model ready to be quantized.

    Attributes:
        model: parameters on the meta device where ``source`` is lazy, else float32.
        tokenizer: the model's own, or None where it has none.
        origin: what the user named.
    """

    model: nn.Module
    source: WeightSource
    tokenizer: Any
    folder: Path
    origin: str
    gguf: str | None = None

    @property
    def bytes_float(self) -> int:
        """Size of all parameters in their stored dtype, a shared one counted once; a GGUF counts as the float32 it became."""
        return sum(p.numel() * self.source.dtype(n).itemsize for n, p in self.model.named_parameters())


def open_model(origin: str) -> FloatModel:
    """Return the float model that ``origin`` names: a directory, a ``.gguf`` file, or a hub name.

    Raises:
        SourceError: not found, not readable, or not a model transformers knows.
    """
    path = Path(origin)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"{origin} is a file but not .gguf; name the model's directory, a .gguf file or a hub name")
        return _open_gguf(path)
    if not path.exists():
        path = _download(origin)
    if not (path / "config.json").is_file():
        raise SourceError(f"{path} holds no config.json; name a directory saved by transformers, a .gguf file or a hub name")
    config = _config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise SourceError(f"{origin} is quantized already ({_method(config)}); quantize from the float model")
    model_class = _model_class(config, path)
    files = TensorFiles(path)
    check_sizes(config.to_dict(), files.shapes.values(), path / "config.json")
    model = _empty_model(model_class, config, path)
    declared = getattr(model, "_tied_weights_keys", None)
    tied = declared if isinstance(declared, dict) and config.get_text_config().tie_word_embeddings else {}
    renames = {k: v for k, v in tied.items() if k not in files.where}
    missing = [n for n, _ in model.named_parameters(remove_duplicate=False) if renames.get(n, n) not in files.where]
    if missing:  # the checkpoint's names differ from the model's: transformers converts them while loading everything
        model, source = _load_whole(model_class, path)
    else:
        source = LazyFiles(files, renames)
        source.check(model)
    return FloatModel(model, source, open_tokenizer(path), path, origin)


def _empty_model(model_class: Any, config: Any, path: Path) -> Any:
    """Return the model with its parameters on the meta device and its own generation settings."""
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    steady()  # building makes every weight for a moment
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_class._from_config(config) if hasattr(model_class, "_from_config") else model_class(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.tie_weights()  # outside the block above, which makes a new parameter of every one that is set
            if getattr(model, "generation_config", None) is not None and (path / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # whatever the model's code raises on sizes that do not fit together
        raise SourceError(
            f"{path / 'config.json'} describes no {model_class.__name__} that can be built: {_in_short(error)}"
        ) from None
    return model.eval()


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # it raises what its parsers and each model's own checks raise
        raise SourceError(f"{path / 'config.json'} is not a configuration transformers reads: {_in_short(error)}") from None


def _method(config: Any) -> str:
    found = config.quantization_config
    return str(found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "unknown method"))


def _model_class(config: Any, path: Path) -> Any:
    """Return the class config.json names, or the causal language model of its type."""
    import transformers

    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    try:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise SourceError(
            f"{path / 'config.json'} names no architecture that transformers {transformers.__version__} has"
        ) from None


def _load_whole(model_class: Any, path: Path) -> tuple[nn.Module, WeightSource]:
    try:
        model, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from None
    if info["missing_keys"]:
        raise SourceError(
            f"{path} lacks {sorted(info['missing_keys'])[0]!r} and {len(info['missing_keys']) - 1} more tensors; the checkpoint is incomplete"
        )
    return model.eval(), InMemory(model)


def open_tokenizer(path: Path, **kwargs: Any) -> Any:
    """Return the tokenizer saved in ``path``, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except Exception:
        return None  # a vision or audio model, or one saved without its tokenizer


def open_processor(path: Path, kind: str) -> Any:
    """Return the "image" processor or "audio" feature extractor saved in ``path``, or None where there is none."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    try:
        return (AutoImageProcessor if kind == "image" else AutoFeatureExtractor).from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError):
        return None


def _open_gguf(path: Path) -> FloatModel:
    """Return a GGUF file dequantized to float32 through transformers, all in memory."""
    from transformers import AutoModelForCausalLM

    check_gguf(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except ImportError:
        raise SourceError(f"reading {path.name} needs the gguf package: pip install 'llm-fp4[gguf]'") from None
    except LlmFp4Error:
        raise
    except Exception as error:
        raise SourceError(f"{path} cannot be read as GGUF ({_in_short(error)}); it may be truncated, download it again") from None
    model.hf_quantizer = None  # what transformers loaded is plain float now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    return FloatModel(
        model.eval(), InMemory(model), open_tokenizer(path.parent, gguf_file=path.name), path.parent, str(path), path.name
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except HFValidationError:
        raise SourceError(f"{name} is neither an existing path nor a hub name") from None
    except Exception as error:
        raise SourceError(
            f"{name} is no directory here, and the hub did not give it ({type(error).__name__}); check the name and the network"
        ) from None
