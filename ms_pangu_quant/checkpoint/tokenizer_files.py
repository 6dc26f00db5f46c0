"""The JSON files beside a tokenizer's pieces, and what is read of them whatever the form of the pieces."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.suggestion import fetching

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, UTF-8 cannot


@dataclass(frozen=True)
class TokenizerFiles:
    """Each is empty where its file is missing. Raises CheckpointError where one is malformed."""

    directory: Path
    config: Mapping[str, Any]  # tokenizer_config.json
    model: Mapping[str, Any]  # config.json
    generation: Mapping[str, Any]  # generation_config.json
    special: Mapping[str, Any]  # special_tokens_map.json

    @classmethod
    def of(cls, directory: Path) -> TokenizerFiles:
        names = ("tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json")
        return cls(directory, *(read_json(directory / name) for name in names))

    @property
    def limit(self) -> int:
        """Of ids: config.json's vocab_size."""
        size = self.model.get("vocab_size")
        return size if isinstance(size, int) else 2**31

    @property
    def kind(self) -> str:
        """The tokenizer's class, without Fast; a Llama's where none is named, for openPangu always names its own."""
        named = self.config.get("tokenizer_class") or self.model.get("tokenizer_class")
        return str(named or "LlamaTokenizer").removesuffix("Fast")

    def token(self, name: str) -> Any:
        """bos_token and so on, text or an object; None where neither file has it."""
        return self.config.get(name) or self.special.get(name)

    @property
    def end_ids(self) -> frozenset[int]:
        """What generation_config.json and config.json say ends an answer; what is no id of the model never comes."""
        found = [values.get("eos_token_id") for values in (self.generation, self.model)]
        ids = [token_id for value in found for token_id in (value if isinstance(value, list) else [value])]
        return frozenset(token_id for token_id in ids if type(token_id) is int and 0 <= token_id < self.limit)


def read(path: Path, todo: str = "copy it from the original checkpoint") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror}); {todo}") from None


def read_text(path: Path) -> str:
    """UTF-8, or UTF-16 with a byte order mark, which is no part of the text."""
    content = read(path)
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error}); copy it from the original checkpoint") from None


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. json takes a byte order mark off bytes."""
    if not path.exists():
        return {}
    content = read(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        todo = fetching(content, "copy it from the original checkpoint")
        raise CheckpointError(f"{path}: not JSON ({error}); {todo}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got a JSON {type(value).__name__}, wanted an object")
    return value


def token_text(value: Any, where: Path) -> str:
    """The text of a token that is written as a string or as an object with "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text or _SURROGATE.search(text):
        raise CheckpointError(f"{where}: {value!r} is not a token, wanted a string or an object with its content")
    return text


def beyond_the_model(text: str, token_id: int, limit: int) -> RequestError:
    return RequestError(
        f"token {text!r} of the text has id {token_id}, which the model does not know: config.json's vocab_size is "
        f"{limit}; leave the token out"
    )


def check_ids(ids: Sequence[int], size: int, directory: Path) -> None:
    """Raises RequestError for what is no id of the model or its tokenizer, which have `size` together."""
    for token_id in ids:
        if not 0 <= token_id < size:
            raise RequestError(f"no token of {directory} has the id {token_id}; wanted 0 to {size - 1}")


def added_tokens_decoder(files: TokenizerFiles) -> dict[str, Any]:
    decoder = files.config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{files.directory / 'tokenizer_config.json'}: added_tokens_decoder is a {type(decoder).__name__}, "
            "wanted an object of ids"
        )
    return decoder
