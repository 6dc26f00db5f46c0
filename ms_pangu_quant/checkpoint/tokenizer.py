"""Text <-> ids and chats -> text, from the tokenizer files of a checkpoint directory.

Text is cut at the added tokens (leftmost, then longest), each of which becomes its own id; what lies between goes
through sentencepiece, one segment at a time, and decoding joins the same segments. Chats are rendered by the
checkpoint's template in a jinja2 sandbox; nothing else of the checkpoint is executed, and transformers is not needed.

Checked against openPangu-Embedded-7B's published tokenization_openpangu.py and tokenizer_config.json on sentencepiece
models trained for the purpose: same ids, texts and prompts. Its own tokenizer.model was not at hand, so not checked:
whether that puts a space in front of each segment (what the file says is done), whether its pieces agree with the added
tokens (those win), and any id of ordinary text.

Not here: tokenizer.json, tools in chats, add_eos_token (a prompt that ends in eos is over). A hostile template cannot
reach Python or print without end, but it can still waste time in nested loops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor

from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.suggestion import did_you_mean

THINKING_MODES = ("slow_think", "auto_think", "no_think")

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, UTF-8 cannot
_SUFFIXES = ("", " /auto_think", " /no_think")
_ROLES = ("system", "user", "assistant", "tool", "function")
_MAX_TEMPLATE, _MAX_RENDERED = 64 << 10, 4 << 20  # characters
_OPENPANGU_TEMPLATE = (
    "{% set label = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', 'function': '方法'} %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}[unused9]系统：[unused10]{% endif %}"
    "[unused9]{{ label[message['role']] }}：{{ message['content'] }}[unused10]"
    "{% endfor %}"
    "{% if add_generation_prompt %}[unused9]助手：{% endif %}"
)


@dataclass(frozen=True)
class Thought:
    """Generated ids, without the markers and eos."""

    thought: tuple[int, ...] | None  # None: there was none
    answer: tuple[int, ...]
    closed: bool  # False only if generation stopped inside the thought; the answer is empty then


class Tokenizer:
    """vocab_size is one more than the largest id; ids below it may be unused. bos_id, think_start_id and think_end_id are
    None where the files do not name such a token."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError where a file is missing or malformed, or where two of them contradict each other."""
        self._where = where = directory / "tokenizer_config.json"
        self._pieces = pieces = _read_pieces(directory / "tokenizer.model")
        config, model = _read_json(where, required=True), _read_json(directory / "config.json")
        limit = model["vocab_size"] if isinstance(model.get("vocab_size"), int) else 2**31
        if (count := pieces.GetPieceSize()) > limit:
            raise CheckpointError(
                f"{directory / 'tokenizer.model'}: got {count} pieces, config.json's vocab_size is "
                f"{limit}; is the tokenizer from another checkpoint?"
            )
        added = _added_tokens(directory, config, limit)
        self._named = named = _named_tokens(directory, config, model, added, pieces)
        if "eos_token" not in named:
            raise CheckpointError(
                f"{where}: names no eos_token, and config.json no eos_token_id, so that generation "
                "would never stop; take both files from the original checkpoint"
            )
        self._texts = {i: pieces.IdToPiece(i) for i in named.values() if i < count}
        self._texts |= {token_id: text for text, token_id in added.items()}
        self._added = {text: token_id for token_id, text in self._texts.items()}  # all that sentencepiece never sees
        self._splitter = re.compile("(" + "|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) + ")")
        self.vocab_size: int = max(count, 1 + max(self._texts))
        self.eos_id, self.bos_id = named["eos_token"], named.get("bos_token")
        self.think_start_id = _find("[unused16]", added, pieces)
        self.think_end_id = _find("[unused17]", added, pieces)
        self._add_bos = self.bos_id is not None and str(config.get("add_bos_token", True)).lower() != "false"
        template = config.get("chat_template")
        if (newer := directory / "chat_template.jinja").exists():
            template = _read(newer).decode("utf-8", "replace")
        if template is None and _find("[unused9]", added, pieces) is not None:
            template = _OPENPANGU_TEMPLATE
        self._template = None if template is None else _compile(template, directory)

    def encode(self, text: str) -> list[int]:
        """bos is in front if tokenizer_config.json's add_bos_token says so.

        As in the official tokenizer, a control symbol in the text is that token: clean what you do not trust.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode ({error}); was it read as another encoding?") from None
        ids = [self.bos_id] if self._add_bos and self.bos_id is not None else []
        for index, segment in enumerate(self._splitter.split(text)):
            ids += [self._added[segment]] if index % 2 else self._pieces.Encode(segment)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Inverse of encode, up to what sentencepiece normalizes (U+2581 always comes back as a space).

        skip_special_tokens leaves out bos, eos, pad and unk. [unused9], [unused16] and [unused17] stay, as with the
        official tokenizer; see split_thought. Bytes that are not UTF-8 become U+FFFD.
        """
        parts: list[str] = []
        run: list[int] = []
        skipped = self._named.values() if skip_special_tokens else ()
        for token_id in map(int, ids):
            text = self._texts.get(token_id)
            if text is None and not 0 <= token_id < self._pieces.GetPieceSize():
                raise RequestError(
                    f"no token of {self._where.parent} has the id {token_id}; wanted 0 to {self.vocab_size - 1}"
                )
            if text is None and not self._pieces.IsControl(token_id):
                run.append(token_id)
            elif token_id not in skipped:
                parts += [self._pieces.Decode(run) if run else "", text or self._pieces.IdToPiece(token_id)]
                run = []
        return "".join([*parts, self._pieces.Decode(run) if run else ""])

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, mode: str = "slow_think", add_generation_prompt: bool = True
    ) -> str:
        """The prompt as text, without bos.

        mode    slow_think leaves the messages alone; the others append " /auto_think" or " /no_think" to the last user
                message unless it ends so already.
        Raises  RequestError for messages that make no chat, CheckpointError for a template that fails.
        """
        chat = _checked_chat(messages, mode)
        if self._template is None:
            raise RequestError(f"{self._where}: has no chat_template, and openPangu's needs an [unused9] token")
        rendered, size = [], 0
        try:
            tokens = {name: self._texts[token_id] for name, token_id in self._named.items()}
            for part in self._template.generate(tokens, messages=chat, add_generation_prompt=add_generation_prompt):
                rendered.append(part)
                size += len(part)
                if size > _MAX_RENDERED:
                    raise TemplateError(f"more than {_MAX_RENDERED} characters of output")
        except RequestError:
            raise
        except Exception as error:  # a template can fail in any way
            raise CheckpointError(
                f"{self._where.parent}: chat_template fails, {type(error).__name__}: {error}; take "
                "the original checkpoint's, or none for the openPangu format"
            ) from None
        prompt = "".join(rendered)
        for index, message in enumerate(chat):
            if message["content"].strip() not in prompt:
                raise RequestError(f"messages[{index}]: the chat_template leaves out this {message['role']} message")
        return prompt

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, mode: str = "slow_think", add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of the rendered chat; bos is in front, once, as in the official recipe, unless add_bos_token is false."""
        ids = self.encode(self.render_chat(messages, mode=mode, add_generation_prompt=add_generation_prompt))
        return ids[1:] if self._add_bos and ids[:2] == [self.bos_id] * 2 else ids

    def split_thought(self, ids: Sequence[int]) -> Thought:
        """Split generated ids by id, never by text. eos and what follows it is cut off first.

        The first [unused17] closes; the first [unused16] before it opens, and what precedes that is dropped. With an
        [unused17] alone the thought begins at the first id: the model may omit [unused16] (official reasoning parser).
        """
        kept = tuple(map(int, ids))
        kept = kept[: _index(kept, self.eos_id, len(kept))]
        end = _index(kept, self.think_end_id, len(kept))
        begin = _index(kept[:end], self.think_start_id, -1) + 1
        if begin == 0 and end == len(kept):
            return Thought(None, kept, True)
        return Thought(kept[begin:end], kept[end + 1 :], end < len(kept))


def _index(ids: tuple[int, ...], wanted: int | None, default: int) -> int:
    return ids.index(wanted) if wanted is not None and wanted in ids else default


def _find(text: str, added: Mapping[str, int], pieces: SentencePieceProcessor) -> int | None:
    piece_id = pieces.PieceToId(text)  # unk for what it does not know
    return added.get(text, piece_id if pieces.IdToPiece(piece_id) == text else None)


def _read(path: Path, todo: str = "copy it from the original checkpoint") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror}); {todo}") from None


def _read_pieces(path: Path) -> SentencePieceProcessor:
    proto = _read(path, "only tokenizers made with sentencepiece are supported (a tokenizer.json alone is not)")
    with suppress(RuntimeError, OSError, UnicodeDecodeError):
        # An empty file loads, as a model without pieces, and so does a damaged one whose unk is none of them.
        if proto and 0 <= (pieces := SentencePieceProcessor(model_proto=proto)).unk_id() < pieces.GetPieceSize():
            pieces.IdToPiece(list(range(pieces.GetPieceSize())))  # every piece is text
            return pieces
    todo = "run git lfs pull" if proto.startswith(b"version https://git-lfs") else "download it again"
    raise CheckpointError(f"{path}: these {len(proto)} bytes are not a sentencepiece model; {todo}")


def _read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); copy it from the original checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got a JSON {type(value).__name__}, wanted an object")
    return value


def _added_tokens(directory: Path, config: Mapping[str, Any], limit: int) -> dict[str, int]:
    """Token -> id, from tokenizer_config.json's added_tokens_decoder and from added_tokens.json."""
    where, older = directory / "tokenizer_config.json", directory / "added_tokens.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{where}: added_tokens_decoder is a {type(decoder).__name__}, wanted an object of ids")
    entries = [(where, _content(entry, where), value) for value, entry in decoder.items()]
    entries += [(older, text, value) for text, value in _read_json(older).items()]
    added: dict[str, int] = {}
    texts: dict[int, str] = {}
    for path, text, value in entries:
        token_id = _id(value, f"{path}: added token {text!r}", limit)
        if added.setdefault(text, token_id) != token_id or texts.setdefault(token_id, text) != text:
            other = texts.get(token_id, text)
            raise CheckpointError(
                f"{path}: added token {text!r} with id {token_id} clashes with {other!r} with id "
                f"{added[other]}; keep the right one"
            )
    return added


def _content(value: Any, where: Path) -> str:
    """The text of a token that is written as a string or as an object with "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text or _SURROGATE.search(text):
        raise CheckpointError(f"{where}: {value!r} is not a token, wanted a string or an object with its content")
    for flag in ("lstrip", "rstrip", "single_word"):
        if isinstance(value, dict) and value.get(flag):
            raise CheckpointError(f"{where}: token {text!r} sets {flag}, which is not supported (openPangu sets none)")
    return text


def _id(value: Any, what: str, limit: int) -> int:
    token_id = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limit:
        raise CheckpointError(f"{what}: got id {value!r}, wanted 0 to {limit - 1}; are the files of one checkpoint?")
    return token_id


def _named_tokens(
    directory: Path,
    config: Mapping[str, Any],
    model: dict[str, Any],
    added: Mapping[str, int],
    pieces: SentencePieceProcessor,
) -> dict[str, int]:
    """Ids of bos_token, eos_token, pad_token, unk_token: as the tokenizer's files say, else the two configs' ids."""
    where = directory / "tokenizer_config.json"
    texts = _read_json(directory / "special_tokens_map.json")
    ids = model | _read_json(directory / "generation_config.json")
    named: dict[str, int] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = ids.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        if (token := config.get(name) or texts.get(name)) is not None:
            text = _content(token, where)
            if (found := _find(text, added, pieces)) is None:
                raise CheckpointError(
                    f"{where}: {name} {text!r} is neither an added token nor a piece of tokenizer."
                    "model; list it in added_tokens_decoder with its id"
                )
            named[name] = found
        elif isinstance(value, int) and value in added.values():
            named[name] = value
        elif value not in (None, -1):  # old Llama configs have pad_token_id -1
            named[name] = _id(value, f"{directory / 'config.json'}: {name}_id", pieces.GetPieceSize())
    return named


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses the operators that turn a short template into a huge value."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> NoReturn:
        raise TemplateError(f"operator {operator} is not allowed")


def _raise_exception(message: object) -> NoReturn:
    raise RequestError(f"the checkpoint's chat_template refuses these messages: {message}")


def _compile(template: Any, where: Path) -> Template:
    if not isinstance(template, str) or len(template) > _MAX_TEMPLATE:
        raise CheckpointError(f"{where}: chat_template is not a string of at most {_MAX_TEMPLATE} characters")
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own would escape < and >
    try:
        return sandbox.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise CheckpointError(f"{where}: chat_template is not a jinja2 template ({error})") from None


def _checked_chat(messages: Sequence[Mapping[str, str]], mode: str) -> list[dict[str, str]]:
    """A copy of messages with the mode's suffix on the last user message."""
    if mode not in THINKING_MODES:
        close = did_you_mean(mode, THINKING_MODES)
        raise RequestError(f"thinking mode {mode!r} is unknown{close}, wanted one of {', '.join(THINKING_MODES)}")
    if not messages:
        raise RequestError("messages is empty, wanted at least one user message")
    for index, message in enumerate(messages):
        if message.get("role") not in _ROLES:
            raise RequestError(f"messages[{index}]: role is {message.get('role')!r}, wanted one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"messages[{index}]: content is {message.get('content')!r}, wanted a string")
    chat = [dict(message) for message in messages]
    suffix = _SUFFIXES[THINKING_MODES.index(mode)]
    if suffix:
        user = next((message for message in reversed(chat) if message["role"] == "user"), None)
        if user is None:
            raise RequestError(f"mode {mode!r} is asked for at the end of a user message, and there is none")
        if not user["content"].endswith(suffix):
            if user["content"].endswith(_SUFFIXES[1:]):
                raise RequestError(f"mode is {mode!r}, but the last user message asks for another one; remove either")
            user["content"] += suffix
    return chat
