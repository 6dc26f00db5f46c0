"""What a server needs to read a checkpoint whose tokenizer is code: openPangu's PanguTokenizer, which transformers has not.

tokenizer.model becomes a tokenizer.json (a BPE of the tokenizers library) of the same ids, tokenizer_config.json names the
class of transformers that reads it, and the chat template writes the bos that the model was trained with: a server puts
none in front of a rendered chat. auto_map and tokenizer.model stay, so that with trust_remote_code the original's own class
is read, which puts a bos in front of a text; whoever renders first leaves one out.

How sentencepiece's BPE is said in the library's words: pairs of pieces merge in the order of what they make (its score).
The space in front and U+2581 are normalizers, since those see what lies between added tokens, as sentencepiece does here.
Its user-defined symbols are added tokens too. Only where there is a space in front, which the library would put behind them
as well, or one in a symbol, are they cut out afterwards, and a text "<0x0A>" between two of them becomes that byte.

Equal ids are tried on every piece before anything is written. Decoding differs in one space: sentencepiece takes the one in
front off each text between added tokens, the library only off the first.

Not here: sentencepiece models that are no BPE or normalize characters (the library does so by graphemes, with other ids in
rare texts), added tokens with an id that the model does not have.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from ms_pangu_quant.checkpoint.chat import OPENPANGU_TEMPLATE, TEMPLATE_FILE, find_template
from ms_pangu_quant.checkpoint.files import json_bytes
from ms_pangu_quant.checkpoint.sentencepieces import SentencePieces
from ms_pangu_quant.checkpoint.tokenizer import OPENPANGU_TOKENIZER, Tokenizer
from ms_pangu_quant.checkpoint.tokenizer_files import TokenizerFiles, added_tokens_decoder, read
from ms_pangu_quant.errors import CheckpointError, PanguQuantError

__all__ = ["served_files", "unserved"]

CONFIG_FILE = "tokenizer_config.json"
_SPACE = "\u2581"  # as sentencepiece writes it
_BPE = 2  # a type of its models
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4  # types of its pieces
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_BOS = "{{ bos_token }}{# the model was trained with it; a server that renders a chat adds none #}\n"
# What an answer is made of, for servers and programs that read it: transformers 5, vLLM's --reasoning-parser hf.
_ANSWER = {
    "start_anchor": "[unused9]助手：",
    "defaults": {"role": "assistant"},
    "fields": {"thinking": {"open": "[unused16]", "close": "[unused17]"}, "content": {"close": "[unused10]"}},
}


def served_files(directory: Path) -> dict[str, Any]:
    """File name -> JSON value, or text of a template: what is to stand beside tokenizer.model, or instead of the
    original's. Empty for what is no PanguTokenizer's. Raises CheckpointError where the ids would be others."""
    files = TokenizerFiles.of(directory)
    if files.kind != OPENPANGU_TOKENIZER or not (directory / "tokenizer.model").exists():
        return {}
    pieces = SentencePieces(files)
    value = _tokenizer_json(files, pieces)
    _check_ids(directory, value, pieces)
    names = {name: pieces.text_of(token_id) for name, token_id in pieces.named.items() if token_id < files.limit}
    kept = {name: value for name, value in files.config.items() if name not in _NAMED}
    tokens = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in value["added_tokens"]}
    config = {**kept, **names, "added_tokens_decoder": tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    if pieces.find("[unused16]") is not None and pieces.find("[unused17]") is not None:
        config.setdefault("response_template", _ANSWER)
    return {"tokenizer.json": value, CONFIG_FILE: config, **_template(directory, config, pieces)}


def unserved(directory: Path) -> CheckpointError | None:
    """Why a directory that was written has openPangu's tokenizer and no tokenizer.json."""
    try:
        served_files(directory)
    except CheckpointError as error:
        return error
    return None


def _template(directory: Path, config: dict[str, Any], pieces: SentencePieces) -> dict[str, str]:
    """The file of the chat template that is to be another one, with the bos; tokenizer_config.json's is put into `config`.

    Where a chat begins with bos already, or cannot be rendered, nothing changes."""
    try:
        rendered = Tokenizer(directory).render_chat([{"role": "user", "content": "a"}])
    except PanguQuantError:
        return {}
    template, where = find_template(directory, config)
    if template is None:
        template = config["chat_template"] = OPENPANGU_TEMPLATE
    if pieces.bos is None or rendered.startswith(pieces.text_of(pieces.bos)):
        return {}
    if where.name == CONFIG_FILE and isinstance(config["chat_template"], str):
        config["chat_template"] = _BOS + template
        return {}
    return {str(where.relative_to(directory)) if where.suffix == ".jinja" else TEMPLATE_FILE: _BOS + template}


def _tokenizer_json(files: TokenizerFiles, pieces: SentencePieces) -> dict[str, Any]:
    where = files.directory / "tokenizer.model"
    model = _Model(read(where))
    if not model.is_plain_bpe:
        raise CheckpointError(
            f"{where}: no tokenizer.json of the same ids can be made of it: it is no BPE, or normalizes characters"
        )
    added = {text: token_id for text, token_id in pieces.added.items() if token_id < files.limit}
    symbols = [symbol for symbol in model.of_type(_USER_DEFINED) if symbol not in added]
    cut = symbols if model.add_dummy_prefix or any(_SPACE in symbol for symbol in symbols) else []
    taken = set(added.values())
    ids = {piece: token_id for token_id, piece in enumerate(model.pieces) if token_id not in taken} | added
    scores = dict(zip(model.pieces, model.scores, strict=True))
    normal = {piece: scores[piece] for piece in model.of_type(_NORMAL)}
    if lost := normal.keys() - ids.keys():
        raise CheckpointError(
            f"{where}: no tokenizer.json of the same ids can be made of it: its piece {min(lost)!r} has the id of an added "
            "token"
        )
    bpe = {
        "type": "BPE",
        "unk_token": model.of_type(_UNKNOWN)[0],
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": bool(cut),
        "vocab": ids,
        "merges": _merges(normal, ids),
    }
    pattern = Regex("|".join(map(_escaped, sorted(cut, key=len, reverse=True))))
    first = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    back = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(files, pieces, added if cut else added | {text: ids[text] for text in symbols}),
        "normalizer": _json(normalizers.Sequence(_normalizers(model))),
        "pre_tokenizer": _json(pre_tokenizers.Split(pattern, "isolated")) if cut else None,
        "post_processor": _post_processor(pieces),
        "decoder": _json(back),
        "model": bpe,
    }


class _Model:
    """What is needed of a sentencepiece_model.proto. The protobuf library is not imported for it: MindSpore has to be the
    first that does, and one process cannot have sentencepiece's module of it beside transformers' copy."""

    def __init__(self, content: bytes) -> None:
        fields = _fields(content)
        trainer, normalizer = ([value for number, value in fields if number == which] for which in (2, 3))
        said, spaces = dict(_fields(b"".join(trainer))), dict(_fields(b"".join(normalizer)))
        self.is_plain_bpe = said.get(3) == _BPE and not said.get(24) and not spaces.get(2) and spaces.get(5, 1) == 1
        self.byte_fallback = bool(said.get(35, 0))
        self.add_dummy_prefix, self.remove_extra_whitespaces = bool(spaces.get(3, 1)), bool(spaces.get(4, 1))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        self.pieces = [piece[1].decode() for piece in pieces]
        self.scores = [piece.get(2, 0.0) for piece in pieces]
        self.types = [piece.get(3, _NORMAL) for piece in pieces]

    def of_type(self, wanted: int) -> list[str]:
        return [piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind == wanted]


def _fields(message: bytes) -> list[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: an int, a float or bytes. It was read once, and so is whole."""
    found: list[tuple[int, Any]] = []
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value: Any
        if key & 7 == 0:
            value, at = _varint(message, at)
        elif key & 7 == 5:
            (value,), at = struct.unpack_from("<f", message, at), at + 4
        elif key & 7 == 1:
            value, at = message[at : at + 8], at + 8
        else:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where the next begins."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _json(part: Any) -> Any:
    """Of a part of the library's pipeline, as it is written into tokenizer.json."""
    return json.loads(part.__getstate__())


def _post_processor(pieces: SentencePieces) -> Any:
    if pieces.bos is None:
        return None
    bos = pieces.text_of(pieces.bos)
    both = [f"{bos}:0", "$A:0", f"{bos}:1", "$B:1"]
    return _json(TemplateProcessing(single=both[:2], pair=both, special_tokens=[(bos, pieces.bos)]))


def _added_tokens(files: TokenizerFiles, pieces: SentencePieces, ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """By id. Special, and so left out where a server leaves out special tokens, are those that are named, as in the
    original's class: [unused16] and [unused17] stay, that a thought can be told from an answer."""
    entries = [entry for entry in added_tokens_decoder(files).values() if isinstance(entry, dict)]
    listed = {entry["content"]: entry for entry in entries}
    named = set(pieces.named.values())
    return [
        {
            "id": token_id,
            "content": text,
            **{flag: bool(listed.get(text, {}).get(flag)) for flag in ("single_word", "lstrip", "rstrip")},
            "normalized": False,
            "special": token_id in named,
        }
        for text, token_id in sorted(ids.items(), key=itemgetter(1))
    ]


def _merges(normal: Mapping[str, float], ids: Mapping[str, int]) -> list[list[str]]:
    """Pairs of pieces that make a piece, what has the highest score first; of one piece in the order of their ids."""
    found = []
    for text, score in normal.items():
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [(left, right) for left, right in halves if left in normal and right in normal]
        found += [(-score, ids[left], ids[right], left, right) for left, right in pairs]
    return [[left, right] for *_, left, right in sorted(found)]


def _normalizers(said: _Model) -> list[normalizers.Normalizer]:
    """What is in front of the text's first character is the prefix: an empty text gets none."""
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if said.add_dummy_prefix else []
    spaced = normalizers.Replace(" ", _SPACE)
    if not said.remove_extra_whitespaces:
        return [*steps, spaced]
    prefix = _SPACE if said.add_dummy_prefix else ""
    leading, doubled = Regex(rf"\A{prefix} +"), Regex(" {2,}")
    trailing = normalizers.Replace(Regex(rf"{_SPACE}+\z"), "")
    return [*steps, normalizers.Replace(leading, prefix), normalizers.Replace(doubled, " "), spaced, trailing]


def _escaped(text: str) -> str:
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text)


def _check_ids(directory: Path, value: Mapping[str, Any], pieces: SentencePieces) -> None:
    """Of every piece's text, and of pieces together. Raises CheckpointError with the first that has others."""
    backend = Backend.from_buffer(json_bytes(value))
    texts = [pieces.decode([token_id], skip_special_tokens=False) for token_id in sorted(pieces.ids())]
    shuffled = random.Random(0).sample(texts, len(texts))
    texts += ["".join(shuffled[start : start + 16]) for start in range(0, len(shuffled), 16)]
    for text, found in zip(texts, backend.encode_batch(texts), strict=True):
        if not pieces.refuses(text) and found.ids != pieces.encode(text):
            raise CheckpointError(
                f"{directory / 'tokenizer.model'}: no tokenizer.json of the same ids can be made of it: {text!r} would be "
                f"{found.ids}, and is {pieces.encode(text)}"
            )
