"""Models of transformers without values, made from their config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def from_config(path: str | Path, dtype: torch.dtype) -> nn.Module:
    """The model that a config.json describes, on the meta device: no values, nothing is downloaded, no code is run.

    Its class is the one that the file names under "architectures"; where it names none that transformers has, a causal
    language model if there is one of its type, else the bare model. The file's quantization is not applied.

    Args:
        path: a config.json, or a folder with one.
        dtype: of its parameters.

    Raises:
        RuntimeError: transformers is not installed.
        ValueError: the file cannot be read, or transformers cannot make a model of it.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError("a config.json needs the transformers package: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return _class_of(transformers, config)(config).to(dtype)
    except Exception as error:  # of whatever kind a configuration makes a model raise
        raise ValueError(f"transformers makes no model of {str(path)!r}: {type(error).__name__}: {error}") from error


def _class_of(transformers: Any, config: Any) -> Any:
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    if (found := next((kind for kind in named if kind is not None), None)) is not None:
        return found
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config
