"""The tokenizer in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from server.models.tensors import CheckpointError, first_line

_TURN_TOKENS = ("<|im_start|>", "<|im_end|>")


def load_tokenizer(folder: Path) -> Any:
    """Of ``tokenizer.json``, or of the vocabulary and merges that Qwen2's has. Raises CheckpointError."""
    if (folder / "tokenizer.json").is_file():
        kind: type[PreTrainedTokenizerBase] = PreTrainedTokenizerFast
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        kind = Qwen2Tokenizer
    else:
        raise CheckpointError(f"{folder} holds no tokenizer.json, nor vocab.json and merges.txt")
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the files make it raise
        raise CheckpointError(f"the tokenizer cannot be read: {first_line(error)}") from error
    for token in _TURN_TOKENS:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise CheckpointError(f"the tokenizer has no token {token}")
    return tokenizer
