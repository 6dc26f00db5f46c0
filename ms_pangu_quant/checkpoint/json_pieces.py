"""tokenizer.json, by the tokenizers library. What transformers 4.57 changes in it after reading is changed here too, so
that ids and texts are those of AutoTokenizer: the tokens that tokenizer_config.json adds, Llama's bos and eos as its class
adds them, the space that ByteLevel puts in front, clean_up_tokenization_spaces.

Not here: add_prefix_space of LlamaTokenizer, for which transformers makes another tokenizer.json out of tokenizer.model.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from ms_pangu_quant.checkpoint.tokenizer_files import (
    TokenizerFiles,
    added_tokens_decoder,
    beyond_the_model,
    check_ids,
    read,
    read_json,
    token_text,
)
from ms_pangu_quant.errors import CheckpointError, PanguQuantError
from ms_pangu_quant.suggestion import fetching

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_DEFAULTS = {  # of transformers' classes for a tokenizer.json
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": dict.fromkeys(_LLAMA, "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>"),
}
_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_COPY = "copy both from the original checkpoint"
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class JsonPieces:
    """Ids beyond config.json's vocab_size are an error only where they are used: of an added token that is when a text has
    it."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._path = path = files.directory / "tokenizer.json"
        content = read(path)
        with _refused(path, "not a tokenizer of the tokenizers library", fetching(content)):
            self._backend = backend = Backend.from_buffer(content.removeprefix(codecs.BOM_UTF8))
            padding = backend.padding or {}
            backend.no_truncation()
            backend.no_padding()
            largest = max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
        if largest >= files.limit:
            raise CheckpointError(
                f"{path}: got ids up to {largest}, config.json's vocab_size is {files.limit}; is the tokenizer from "
                "another checkpoint?"
            )
        texts = _named_texts(files, padding.get("pad_token"))
        with _refused(files.directory / "tokenizer_config.json", "does not fit tokenizer.json", _COPY):
            _add_tokens(backend, files, texts)
            self.named = {name: int(backend.token_to_id(text)) for name, text in texts.items()}
            _as_the_class(backend, files, self.named)
            tokens = backend.get_added_tokens_decoder()
        self.vocab_size = 1 + max(largest, *tokens, 0)
        self._limit = files.limit
        self._beyond = {token_id: token.content for token_id, token in tokens.items() if token_id >= files.limit}
        self._clean = bool(files.config.get("clean_up_tokenization_spaces"))
        eos = [self.named.pop("eos_token", files.limit), *sorted(files.end_ids)]
        self.named.update([("eos_token", i) for i in eos if i < files.limit and backend.id_to_token(i)][:1])

    def ids(self) -> Collection[int]:
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found.values()

    def find(self, text: str) -> int | None:
        found: int | None = self._backend.token_to_id(text)
        return found

    def text_of(self, token_id: int) -> str:
        return str(self._backend.id_to_token(token_id))

    def encode(self, text: str) -> list[int]:
        return self._encode(text, bos=True)

    def encode_prompt(self, text: str) -> list[int]:
        return self._encode(text, bos=False)

    def _encode(self, text: str, *, bos: bool) -> list[int]:
        with _refused(self._path, "cannot encode", _COPY):
            ids: list[int] = self._backend.encode(text, add_special_tokens=bos).ids
        for token_id in self._beyond.keys() & ids if self._beyond else ():
            raise beyond_the_model(self._beyond[token_id], token_id, self._limit)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        size = max(self.vocab_size, self._limit)  # a model may have more rows than there are tokens; those are no text
        check_ids(ids, size, self._path.parent)
        with _refused(self._path, "cannot decode", _COPY):
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        for written in _CLEANED if self._clean else ():
            text = text.replace(written, written.strip())
        return text


@contextmanager
def _refused(path: Path, what: str, todo: str) -> Iterator[None]:
    """What the tokenizers library fails with, as a CheckpointError; some of it is a panic, which is no Exception."""
    try:
        yield
    except (PanguQuantError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        said = "".join(character for character in " ".join(str(error).split()) if character.isprintable())
        raise CheckpointError(f"{path}: {what} ({said[:300]}); {todo}") from None


def _named_texts(files: TokenizerFiles, pad_token: str | None) -> dict[str, str]:
    """bos_token and so on -> text. Without added_tokens_decoder, as older files are, special_tokens_map.json wins.

    pad_token  tokenizer.json's, for files that name none.
    """
    newer = "added_tokens_decoder" in files.config
    defaults = {"pad_token": pad_token, **_DEFAULTS.get(files.kind, {})}
    values = {**defaults, **files.config, **({} if newer else files.special)}
    where = files.directory / "tokenizer_config.json"
    return {name: token_text(values[name], where) for name in _NAMED if values.get(name) is not None}


def _listed_tokens(backend: Backend, files: TokenizerFiles, special: Collection[str]) -> list[AddedToken]:
    """By id, which is all that the ids are for: a token that is a piece keeps that id, another one gets the next."""
    where = files.directory / "tokenizer_config.json"
    if "added_tokens_decoder" in files.config:
        entries = {int(token_id): entry for token_id, entry in added_tokens_decoder(files).items()}
    else:
        older = {token_id: text for text, token_id in read_json(files.directory / "added_tokens.json").items()}
        entries = {
            token_id: {"content": text, "special": text in special, "normalized": text not in special}
            for token_id, text in older.items()
            if token_id not in backend.get_added_tokens_decoder()
        }
    return [
        AddedToken(token_text(entry, where), **{flag: entry[flag] for flag in _FLAGS if flag in entry})
        for _, entry in sorted(entries.items(), key=itemgetter(0))
    ]


def _add_tokens(backend: Backend, files: TokenizerFiles, texts: Mapping[str, str]) -> None:
    """What tokenizer_config.json lists and tokenizer.json does not, or with other flags; then special tokens in neither."""
    special = set(texts.values())
    as_stored = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    changed = [token for token in _listed_tokens(backend, files, special) if repr(token) not in as_stored]
    for token in changed:
        token.special = token.special or token.content in special
    backend.add_tokens(changed)
    where = files.directory / "tokenizer_config.json"
    more = [token_text(token, where) for token in files.config.get("additional_special_tokens") or ()]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    rest = [text for text in dict.fromkeys([*texts.values(), *more]) if text not in known]
    backend.add_tokens([AddedToken(text, special=True) for text in rest])


def _as_the_class(backend: Backend, files: TokenizerFiles, named: Mapping[str, int]) -> None:
    """What transformers' class sets whatever tokenizer.json says."""
    if files.kind not in _ADD_BOS:
        if isinstance(backend.pre_tokenizer, ByteLevel):
            backend.pre_tokenizer.add_prefix_space = bool(files.config.get("add_prefix_space"))
        return
    ends = []
    for name, default in (("bos_token", True), ("eos_token", False)):
        asked = files.config.get(f"add_{name}", default) and name in named
        ends.append([(str(backend.id_to_token(named[name])), named[name])] if asked else [])
    bos, eos = ends
    single = [f"{text}:0" for text in [*(text for text, _ in bos), "$A", *(text for text, _ in eos)]]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[*bos, *eos])
