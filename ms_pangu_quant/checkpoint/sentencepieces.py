"""tokenizer.model: text is cut at the added tokens (leftmost, then longest), each of which becomes its own id; what lies
between goes through sentencepiece, one segment at a time, and decoding joins the same segments.

Checked against openPangu-Embedded-7B's published tokenization_openpangu.py and tokenizer_config.json on sentencepiece
models trained for the purpose: same ids, texts and prompts. Its own tokenizer.model was not at hand, so not checked:
whether that puts a space in front of each segment (what the file says is done), whether its pieces agree with the added
tokens (those win), and any id of ordinary text.

What transformers never uses is not minded: a token with an id beyond the model or with flags that are not supported, a pad
or unk token without an id. A text that has one is refused.

Not here: add_eos_token (a prompt that ends in eos is over).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from ms_pangu_quant.checkpoint.tokenizer_files import (
    TokenizerFiles,
    added_tokens_decoder,
    beyond_the_model,
    check_ids,
    read,
    read_json,
    token_text,
)
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.suggestion import fetching

_USED, _NAMED = ("bos_token", "eos_token"), ("bos_token", "eos_token", "pad_token", "unk_token")
_MOST_IDS = 2**31  # a token's id may lie beyond the model


class SentencePieces:
    """added  text -> id of all that is cut out before sentencepiece sees it.  bos  what encode puts in front, or None."""

    def __init__(self, files: TokenizerFiles) -> None:
        directory, limit = files.directory, files.limit
        self._directory, self._limit = directory, limit
        self._model = pieces = _read_sentencepiece(directory / "tokenizer.model")
        read(directory / "tokenizer_config.json")  # it names the tokens
        if (count := pieces.GetPieceSize()) > limit:
            raise CheckpointError(
                f"{directory / 'tokenizer.model'}: got {count} pieces, config.json's vocab_size is "
                f"{limit}; is the tokenizer from another checkpoint?"
            )
        self._listed = _added_tokens(files)
        self.named = _named_tokens(files, self._listed, pieces)
        self._refused = dict(_refused_texts(files, self._listed, pieces))
        self._texts = {i: pieces.IdToPiece(i) for i in self.named.values() if i < count}
        self._texts |= {token_id: text for text, token_id in self._listed.items()}
        self.added = {text: token_id for token_id, text in self._texts.items()}
        cuts = sorted({*self.added, *self._refused}, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, cuts)) + ")")
        self.vocab_size = max(count, 1 + max(self._texts, default=0))
        self.bos = self.named.get("bos_token") if str(files.config.get("add_bos_token", True)).lower() != "false" else None

    def ids(self) -> Collection[int]:
        return {*range(self._model.GetPieceSize()), *self._texts}

    def refuses(self, text: str) -> bool:
        return any(segment in self._refused for segment in self._splitter.split(text)[1::2])

    def find(self, text: str) -> int | None:
        return _find(text, self._listed, self._model)

    def text_of(self, token_id: int) -> str:
        return self._texts.get(token_id) or str(self._model.IdToPiece(token_id))

    def encode(self, text: str) -> list[int]:
        ids = [] if self.bos is None else [self.bos]
        if self.bos is not None and self.bos >= self._limit:
            raise beyond_the_model(self.text_of(self.bos), self.bos, self._limit)
        for index, segment in enumerate(self._splitter.split(text)):
            if index % 2 and segment in self._refused:
                raise RequestError(self._refused[segment])
            ids += [self.added[segment]] if index % 2 else self._model.Encode(segment)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        ids = self.encode(text)
        return ids[1:] if self.bos is not None and ids[:2] == [self.bos] * 2 else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        parts: list[str] = []
        run: list[int] = []
        skipped = self.named.values() if skip_special_tokens else ()
        check_ids(ids, max(self.vocab_size, self._limit), self._directory)
        count = self._model.GetPieceSize()
        for token_id in ids:
            text = self._texts.get(token_id)
            if text is None and token_id >= count:  # a row of the model that is no token, and no text
                continue
            if text is None and not self._model.IsControl(token_id):
                run.append(token_id)
            elif token_id not in skipped:
                parts += [self._model.Decode(run) if run else "", self.text_of(token_id)]
                run = []
        return "".join([*parts, self._model.Decode(run) if run else ""])


def _find(text: str, added: Mapping[str, int], pieces: SentencePieceProcessor) -> int | None:
    piece_id = pieces.PieceToId(text)  # unk for what it does not know
    return added.get(text, piece_id if pieces.IdToPiece(piece_id) == text else None)


def _read_sentencepiece(path: Path) -> SentencePieceProcessor:
    proto = read(path, "copy the original checkpoint's tokenizer, this sentencepiece file or a tokenizer.json")
    with suppress(RuntimeError, OSError, UnicodeDecodeError):
        # An empty file loads, as a model without pieces, and so does a damaged one whose unk is none of them.
        if proto and 0 <= (pieces := SentencePieceProcessor(model_proto=proto)).unk_id() < pieces.GetPieceSize():
            pieces.IdToPiece(list(range(pieces.GetPieceSize())))  # every piece is text
            return pieces
    raise CheckpointError(f"{path}: these {len(proto)} bytes are not a sentencepiece model; {fetching(proto)}")


def _added_tokens(files: TokenizerFiles) -> dict[str, int]:
    """Token -> id, from tokenizer_config.json's added_tokens_decoder and from added_tokens.json."""
    where, older = files.directory / "tokenizer_config.json", files.directory / "added_tokens.json"
    entries = [(where, token_text(entry, where), value) for value, entry in added_tokens_decoder(files).items()]
    entries += [(older, text, value) for text, value in read_json(older).items()]
    added: dict[str, int] = {}
    texts: dict[int, str] = {}
    for path, text, value in entries:
        token_id = _id(value, f"{path}: added token {text!r}", _MOST_IDS)
        if added.setdefault(text, token_id) != token_id or texts.setdefault(token_id, text) != text:
            other = texts.get(token_id, text)
            raise CheckpointError(
                f"{path}: added token {text!r} with id {token_id} clashes with {other!r} with id "
                f"{added[other]}; keep the right one"
            )
    return added


def _refused_texts(
    files: TokenizerFiles, added: Mapping[str, int], pieces: SentencePieceProcessor
) -> Iterator[tuple[str, str]]:
    """Text of a token that the model has no id for, or that is not matched as it stands -> why no text may have it."""
    where = files.directory / "tokenizer_config.json"
    for text, token_id in added.items():
        if token_id >= files.limit:
            yield text, str(beyond_the_model(text, token_id, files.limit))
    tokens = [token for name in _NAMED if (token := files.token(name)) is not None]
    for token in (*added_tokens_decoder(files).values(), *tokens):
        text = token_text(token, where)
        if _find(text, added, pieces) is None:
            yield text, f"{where}: token {text!r} of the text has no id; list it in added_tokens_decoder"
        for flag in ("lstrip", "rstrip", "single_word"):
            if isinstance(token, dict) and token.get(flag):
                yield text, f"{where}: token {text!r} of the text sets {flag}, which is not supported; leave it out"


def _id(value: Any, what: str, limit: int) -> int:
    token_id = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limit:
        raise CheckpointError(f"{what}: got id {value!r}, wanted 0 to {limit - 1}; are the files of one checkpoint?")
    return token_id


def _named_tokens(files: TokenizerFiles, added: Mapping[str, int], pieces: SentencePieceProcessor) -> dict[str, int]:
    """Ids of bos_token, eos_token, pad_token, unk_token: as the tokenizer's files say, else the two configs' ids."""
    where = files.directory / "tokenizer_config.json"
    ids = {**files.model, **files.generation}
    named: dict[str, int] = {}
    for name in _NAMED:
        value = ids.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        token = files.token(name)
        found = None
        if token is not None:
            text = token_text(token, where)
            found = _find(text, added, pieces)
            if found is None and name in _USED:
                raise CheckpointError(
                    f"{where}: {name} {text!r} is neither an added token nor a piece of tokenizer."
                    "model; list it in added_tokens_decoder with its id"
                )
        if found is None or (name == "eos_token" and found >= files.limit):  # such an end never comes
            found = _configured(name, value, added, pieces, files)
        if found is not None:
            named[name] = found
    return named


def _configured(
    name: str, value: Any, added: Mapping[str, int], pieces: SentencePieceProcessor, files: TokenizerFiles
) -> int | None:
    """The id that the configs give a token which the tokenizer's files do not."""
    if type(value) is int and value in added.values():
        return value
    if value in (None, -1):  # old Llama configs have pad_token_id -1
        return None
    if name not in _USED and not (type(value) is int and 0 <= value < pieces.GetPieceSize()):
        return None
    return _id(value, f"{files.directory / 'config.json'}: {name}_id", pieces.GetPieceSize())
