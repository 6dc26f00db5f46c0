"""Text <-> ids and chats -> text, from the tokenizer files of a checkpoint directory: what all else uses of them.

The pieces have two forms: sentencepiece's tokenizer.model and tokenizer.json. Where both are there tokenizer.json is
read, as transformers does; but PanguTokenizer, which has no fast form there, reads tokenizer.model. Nothing of the
checkpoint but its chat template is executed, and transformers is not needed. Not here: tools in chats.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import Template
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint.architecture import is_embedded_1b
from ms_pangu_quant.checkpoint.chat import (
    OPENPANGU_TEMPLATE,
    THINKING_MODES,
    checked_chat,
    compile_template,
    find_template,
    render,
)
from ms_pangu_quant.checkpoint.files import CheckpointNote
from ms_pangu_quant.checkpoint.json_pieces import JsonPieces
from ms_pangu_quant.checkpoint.sentencepieces import SentencePieces
from ms_pangu_quant.checkpoint.tokenizer_files import TokenizerFiles
from ms_pangu_quant.errors import CheckpointError, RequestError, one_line

__all__ = [
    "OPENPANGU_TOKENIZER",
    "THINKING_MODES",
    "Thought",
    "Tokenizer",
    "completed_generation",
    "end_ids",
    "find_tokenizer",
    "unusable",
]

_FAST, _SLOW = "tokenizer.json", "tokenizer.model"
OPENPANGU_TOKENIZER = "PanguTokenizer"  # code of the checkpoint, which transformers does not have


@dataclass(frozen=True)
class Thought:
    """Generated ids, without the markers and eos."""

    thought: tuple[int, ...] | None  # None: there was none
    answer: tuple[int, ...]
    closed: bool  # False only if generation stopped inside the thought; the answer is empty then


class Pieces(Protocol):
    """named       bos_token, eos_token and so on -> id, for those that the files name.
    vocab_size  one more than the largest id; ids below it may be unused.
    """

    @property
    def named(self) -> Mapping[str, int]: ...

    @property
    def vocab_size(self) -> int: ...

    def ids(self) -> Collection[int]:
        """All that are a token's."""

    def find(self, text: str) -> int | None:
        """The id of the one token that is this text."""

    def text_of(self, token_id: int) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Of a text by itself, with bos in front where the files say so."""

    def encode_prompt(self, text: str) -> list[int]:
        """Of a rendered chat: bos once, or only where the template writes it, as the checkpoint's class does."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """An id of the model that is no token's is no text. Raises RequestError for what is no id."""


class Tokenizer:
    """vocab_size is one more than the largest id; ids below it may be unused. bos_id, think_start_id and think_end_id are
    None where the files do not name such a token.

    eos_id   the tokenizer's own.  end_ids  whatever ends an answer: that one, and those of generation_config.json and
             config.json.
    modes    the thinking modes that the model has; one without thinking tokens has only no_think, as has
             openPangu-Embedded-1B (arXiv 2512.23367v2), to which no word is said for it.
    """

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError where a file is missing or malformed, or where two of them contradict each other."""
        self._directory, self._files = directory, TokenizerFiles.of(directory)
        files = self._files
        self._pieces = pieces = _read_pieces(files)
        if "eos_token" not in pieces.named:
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: names no eos_token, and config.json no eos_token_id, so that "
                "generation would never stop; take both files from the original checkpoint"
            )
        self.vocab_size = pieces.vocab_size
        self.eos_id, self.bos_id = pieces.named["eos_token"], pieces.named.get("bos_token")
        self.end_ids = files.end_ids | {self.eos_id}
        self.think_start_id, self.think_end_id = pieces.find("[unused16]"), pieces.find("[unused17]")
        all_modes = self.think_end_id is not None and not is_embedded_1b(files.model)
        self.modes = THINKING_MODES if all_modes else THINKING_MODES[-1:]

    @cached_property
    def template(self) -> Template | None:
        """None where there is none. Raises CheckpointError; only chats need one, and text does not meet its faults."""
        template, where = find_template(self._directory, self._files.config)
        if template is None and self._pieces.find("[unused9]") is not None:
            template = OPENPANGU_TEMPLATE
        return None if template is None else compile_template(template, where)

    def tell_only_mode(self) -> None:
        """A CheckpointNote where a model that could write a thought has one mode, for whoever has named none."""
        if self.think_end_id is not None and len(self.modes) == 1:
            note = f"{self._directory}: openPangu-Embedded-1B thinks in no mode but {self.modes[0]}, which is taken"
            warnings.warn(CheckpointNote(one_line(note)), stacklevel=3)

    def without_token(self, size: int) -> NDArray[np.bool_] | None:
        """[size], True for the ids of a model of so many that are no token's and end no answer: nothing that it can say, as
        are rows that pad an embedding. None where there is no such id."""
        found = np.ones(size, bool)
        found[[token_id for token_id in {*self._pieces.ids(), *self.end_ids} if token_id < size]] = False
        return found if found.any() else None

    def encode(self, text: str) -> list[int]:
        """bos is in front if the files say so: add_bos_token of tokenizer_config.json, or tokenizer.json.

        As in the official tokenizer, a control symbol in the text is that token: clean what you do not trust.
        """
        return self._pieces.encode(_unicode(text))

    def encode_part(self, text: str) -> list[int]:
        """Of a text that something stands before: without the bos of encode()."""
        ids = self.encode(text)
        return ids[1:] if ids and ids[0] == self.bos_id else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Inverse of encode, up to what the files normalize (sentencepiece's U+2581 always comes back as a space).

        skip_special_tokens leaves out what tokenizer.json calls special; of a tokenizer.model bos, eos, pad and unk:
        [unused9], [unused16] and [unused17] stay, as with the official tokenizer; see split_thought. Bytes that are not
        UTF-8 become U+FFFD.
        """
        return self._pieces.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, mode: str | None = None) -> list[dict[str, str]]:
        """Role and content of each message as a template gets them, the mode's suffix on the last of the user's."""
        return checked_chat(messages, mode, self.modes, thinks=self.think_end_id is not None)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, mode: str | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The prompt as text, without a bos that the template does not write.

        messages  role and content each; an assistant's thought may stand beside it, see checkpoint.messages.
        mode    None and slow_think leave the messages alone; auto_think and no_think append " /auto_think" or " /no_think"
                to the last user message unless it ends so already, but not for a model whose only mode is no_think.
        Raises  RequestError for messages that make no chat or a mode that the model does not have, CheckpointError for a
                template that fails.
        """
        chat = self.chat(messages, mode=mode)
        if self.template is None:
            where = self._directory / "tokenizer_config.json"
            raise RequestError(f"{where}: has no chat_template, and openPangu's needs an [unused9] token")
        tokens = {name: self._pieces.text_of(token_id) for name, token_id in self._pieces.named.items()}
        return render(self.template, chat, self._directory, **tokens, add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, mode: str | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of the rendered chat. bos is in front once, as in openPangu's official recipe, unless add_bos_token is false;
        with a tokenizer.json it is where the template writes it, as in transformers' apply_chat_template."""
        prompt = self.render_chat(messages, mode=mode, add_generation_prompt=add_generation_prompt)
        return self._pieces.encode_prompt(_unicode(prompt))

    def before_end(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Generated ids up to the first that ends an answer."""
        kept = tuple(map(int, ids))
        return kept[: min(_index(kept, end, len(kept)) for end in self.end_ids)]

    def split_thought(self, ids: Sequence[int]) -> Thought:
        """Split generated ids by id, never by text. What ends an answer and what follows it is cut off first.

        The first [unused17] closes; the first [unused16] before it opens, and what precedes that is dropped. With an
        [unused17] alone the thought begins at the first id: the model may omit [unused16] (official reasoning parser).
        """
        kept = self.before_end(ids)
        end = _index(kept, self.think_end_id, len(kept))
        begin = _index(kept[:end], self.think_start_id, -1) + 1
        if begin == 0 and end == len(kept):
            return Thought(None, kept, True)
        return Thought(kept[begin:end], kept[end + 1 :], end < len(kept))


def _index(ids: tuple[int, ...], wanted: int | None, default: int) -> int:
    return ids.index(wanted) if wanted is not None and wanted in ids else default


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode ({error}); was it read as another encoding?") from None
    return text


def _read_pieces(files: TokenizerFiles) -> Pieces:
    fast, slow = ((files.directory / name).exists() for name in (_FAST, _SLOW))
    return JsonPieces(files) if fast and not (slow and files.kind == OPENPANGU_TOKENIZER) else SentencePieces(files)


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """None where the directory has neither tokenizer.json nor tokenizer.model. Raises what Tokenizer raises."""
    return Tokenizer(directory) if any((directory / name).exists() for name in (_FAST, _SLOW)) else None


def end_ids(directory: Path) -> frozenset[int]:
    """What ends an answer in a directory without a tokenizer."""
    return TokenizerFiles.of(directory).end_ids


def unusable(directory: Path) -> CheckpointError | None:
    """Why the tokenizer that a directory has encodes no text, or its template no chat."""
    try:
        if (tokenizer := find_tokenizer(directory)) is not None:
            _ = tokenizer.template
    except CheckpointError as error:
        return error
    return None


def completed_generation(directory: Path) -> dict[str, Any] | None:
    """generation_config.json with all that ends an answer, for programs that look nowhere else: in config.json only where
    there is no such file, in the tokenizer's own never. None where they find all of it."""
    files = TokenizerFiles.of(directory)
    try:
        tokenizer = find_tokenizer(directory)
    except CheckpointError:
        tokenizer = None
    ends = files.end_ids if tokenizer is None else tokenizer.end_ids
    found = (files.generation or files.model).get("eos_token_id")
    said = [token_id for token_id in (found if isinstance(found, list) else [found]) if type(token_id) is int]
    value = [*said, *sorted(ends.difference(said))]
    if value == said:
        return None
    others = files.generation or {
        name: files.model[name] for name in ("bos_token_id", "pad_token_id") if files.model.get(name) is not None
    }
    return {**others, "eos_token_id": value if len(value) > 1 else value[0]}
