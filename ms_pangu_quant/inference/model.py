"""load(): a float or quantized directory becomes an object that gives logits and generates text."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint.cut import cache_heads, check_cut
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer, end_ids, find_tokenizer
from ms_pangu_quant.errors import BackendError, RankLostError, RequestError
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.formats.reader import Reader, open_checkpoint
from ms_pangu_quant.inference.generate import Completion, Request, Room, Scheduler
from ms_pangu_quant.inference.sampling import GenerationSettings, Keywords
from ms_pangu_quant.job import ranks
from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.network import runtime

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
BLOCK_SIZE = 16
_GRAPHS = 1 << 30  # address space that compiling and the threads take; 0.7 GiB with a model of 4 layers
PREFILL_TOKENS = 512  # longer prompts are prefilled in pieces


@dataclass(frozen=True)
class Generation:
    """One answer. thought is None where the model did not think; finish_reason is "eos", "stop" or "length".

    thought_closed is False where generation stopped inside the thought; the answer is empty then.
    thought_tokens counts the tokens of the thought without its markers. end_id is the token behind token_ids that ended the
    answer, None where something else did.
    """

    text: str
    thought: str | None
    answer: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    thought_closed: bool = True
    thought_tokens: int = 0
    end_id: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        prompt_tokens: int,
        finish_reason: str,
        stopped_by: str | None = None,
    ) -> Generation:
        """From generated ids without what ends them. stopped_by: the text that ended the answer, which is no part of it."""
        parts = tokenizer.split_thought(ids)
        text, answer = tokenizer.decode(ids), tokenizer.decode(parts.answer, skip_special_tokens=True)
        if stopped_by is not None:
            text, answer = (part.split(stopped_by)[0] for part in (text, answer))
        thought = None if parts.thought is None else tokenizer.decode(parts.thought, skip_special_tokens=True)
        closed, count = parts.closed, len(parts.thought or ())
        return cls(text, thought, answer, tuple(ids), prompt_tokens, finish_reason, closed, count)


def load(
    path: str | Path,
    device: str = "cpu",
    mode: str = "graph",
    *,
    kv_cache_tokens: int = 8192,
    w4a8: str = "auto",
    head: str = "stored",
    tensor_parallel: int = 1,
) -> Model:
    """Load a Hugging Face openPangu-Embedded or Llama checkpoint, or a directory that pangu-quant wrote.

    device           "cpu" or "ascend"; a process keeps its first device.
    mode             "graph" compiles one graph for prefill and one for decode, for all lengths; "pynative" runs eagerly.
    kv_cache_tokens  tokens that all sequences under way may hold together.
    w4a8             how Ascend computes int4 weights: "grouped" in integers, "weight_only" with float activations, "auto"
                     in integers where the operator takes their groups; the CPU always computes in integers.
    head             "stored", or "int8": the CPU kernels round a quantized checkpoint's head when it is loaded, one scale
                     for each word. Decoding is faster, a tied table is in memory twice; docs/performance.md has the cost.
    tensor_parallel  ranks of an msrun job that hold the network together, each a slice of its layers; all of them must
                     then make the same calls, and all get the same answers.
    Raises           CheckpointError, BackendError, RequestError.
    """
    reader = open_checkpoint(Path(path))
    check_head(head, reader, device)
    runtime.start(device, mode, tensor_parallel=tensor_parallel)
    cache_bytes = kv_cache_tokens * kv_cache.bytes_per_token(reader.config, 4)
    runtime.check_address_space(_GRAPHS + 3 * reader.files.nbytes + cache_bytes)
    return Model(reader, kv_cache_tokens, w4a8, head)


def check_head(head: str, reader: Reader, device: str) -> None:
    """Raises RequestError or BackendError where load() could not compute the head so."""
    if head == "stored":
        return
    if head != "int8":
        raise RequestError(f"head: got {head!r}, wanted stored or int8")
    if reader.format is None:
        raise RequestError(f"head int8: {reader.directory} is a float checkpoint, whose head stays as it is stored")
    if device != "cpu":
        raise RequestError(f"head int8: only the CPU kernels round a head; on {device} it stays as it is stored")
    if library() is None:
        raise BackendError("head int8: there are no CPU kernels to compute it; `pangu-quant doctor` says why")


class Model:
    """A network with its weights and its key/value cache; made by load()."""

    takes_chats = False  # a prompt is asked as its token ids, see evaluation.run.Generator

    def __init__(self, reader: Reader, kv_cache_tokens: int, w4a8: str, head: str) -> None:
        from ms_pangu_quant.network.pangu import build_network
        from ms_pangu_quant.network.weights import served_tensors

        if kv_cache_tokens < 1:
            raise RequestError(f"kv_cache_tokens: got {kv_cache_tokens}, wanted at least 1")
        self.config = reader.config
        self.directory = reader.directory
        self._tokenizer: Tokenizer | None = None
        self._num_blocks = -(-kv_cache_tokens // BLOCK_SIZE)
        self._cut = runtime.tensor_parallel()
        if self._cut > 1:
            check_cut(self.config, self._cut, reader.plan)
        self._compiled: set[str] = set()
        self._closed = False
        self.network = build_network(
            self.config,
            reader.plan,
            num_blocks=self._num_blocks,
            block_size=BLOCK_SIZE,
            options={"w4a8": w4a8, "head": head},
        )
        self.network.load_tensors(served_tensors(reader, self.network.backend, cache=reader.plan.cache))
        self.caches = self.network.backend.new_caches(
            self.config.num_hidden_layers,
            self._num_blocks,
            BLOCK_SIZE,
            cache_heads(self.config, self._cut),
            self.config.head_dim,
            cache=reader.plan.cache,
        )
        if runtime.mode() == "graph":
            self.network.set_dynamic_inputs()

    def close(self) -> None:
        """Give the memory of weights, cache and kernels back; the model is of no use afterwards.

        Without it they stay until the process ends, whatever refers to the model: MindSpore keeps every network that it has
        compiled. Its graph, without values, stays in any case.
        """
        self.network.release()
        self.caches = None
        self._closed = True

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.config.max_position_embeddings

    @property
    def tokenizer(self) -> Tokenizer:
        return self._found_tokenizer() or Tokenizer(self.directory)  # which says what is missing

    def _found_tokenizer(self) -> Tokenizer | None:
        if self._tokenizer is None:
            self._tokenizer = find_tokenizer(self.directory)
        return self._tokenizer

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Next-token logits [tokens, vocab] after each of token_ids [tokens]."""
        self._check_prompt(token_ids)
        tables = [list(range(-(-len(token_ids) // BLOCK_SIZE)))]
        if len(tables[0]) > self._num_blocks:
            raise RequestError(
                f"{len(token_ids)} tokens do not fit in a cache of {self._num_blocks * BLOCK_SIZE}; load "
                "with a larger kv_cache_tokens"
            )
        pieces = []
        step = PREFILL_TOKENS if self.network.backend.chunked_prefill else len(token_ids)
        for start in range(0, len(token_ids), step):
            piece = token_ids[start : start + step]
            pieces.append(self.forward([piece], [start], tables, phase="logits"))
        return np.concatenate(pieces)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 512,
        *,
        mode: str | None = None,
        streams: Sequence[int] | None = None,
        max_batch: int | None = None,
        on_tokens: Callable[[int], None] = lambda count: None,
        **settings: Unpack[Keywords],
    ) -> list[Generation]:
        """Answers to prompts, in their order; batched, and refilled as answers end.

        prompts    each a user message (text), a chat (list of {"role", "content"}), or token ids used as they are.
        mode       thinking mode put into the chat: slow_think, auto_think or no_think; None leaves the messages alone.
        streams    number of each prompt's own stream of random draws under `seed`; its place among prompts by default.
        max_batch  answers under way at a time, no more than the cache holds; the answers do not depend on it.
        on_tokens  called after each pass with how many tokens it gave.
        settings   temperature, top_p, top_k, seed, stop: those of GenerationSettings.

        An id that the tokenizer has no token for, such as a row that pads the embedding, is never drawn.
        """
        chosen = GenerationSettings(max_new_tokens, **settings)
        return in_order(self.stream(prompts, chosen, mode=mode, streams=streams, max_batch=max_batch, on_tokens=on_tokens))

    def stream(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        *,
        mode: str | None = None,
        streams: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        max_batch: int | None = None,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, Generation]]:
        """(place of a prompt, its answer) as each ends, and keeps none of them; arguments as of generate().

        limits  tokens that the answer to each prompt may have, in place of settings.max_new_tokens.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts: got one text, wanted a list of prompts")
        each = settings.of_each(len(prompts), limits)
        requests = [
            self._request(index, self._prompt_ids(prompt, mode), each[index], index if streams is None else streams[index])
            for index, prompt in enumerate(prompts)
        ]
        room = Room(self._num_blocks, BLOCK_SIZE, PREFILL_TOKENS, self.network.backend.chunked_prefill)
        scheduler = Scheduler(
            self, room, settings, self._stop_ids(), barred=self._barred_ids, max_batch=max_batch, on_tokens=on_tokens
        )
        for request, completion in scheduler.run(requests):
            yield request.index, self._generation(request, completion)

    def forward(
        self, pieces: Sequence[Sequence[int]], contexts: Sequence[int], tables: Sequence[Sequence[int]], *, phase: str
    ) -> NDArray[np.float32]:
        """One pass over pieces[b] new tokens of each sequence after contexts[b] cached ones.

        phase    "prefill" -> logits [batch, vocab] after each piece's last token; "decode" is the same for pieces of one
                 token; "logits" -> [tokens, vocab] after every token.
        """
        from mindspore import Tensor

        from ms_pangu_quant.network.batch import packed_inputs

        if self._closed:
            raise RequestError(f"{self.directory}: this model was closed; load it again")
        self.network.set_phase(phase)
        if self._cut == ranks.current().size > 1 and phase not in self._compiled:
            ranks.current().meet()  # loading takes ranks different times, and MindSpore's collectives do not wait for long
            self._compiled.add(phase)
        inputs = packed_inputs([len(piece) for piece in pieces], contexts, tables, BLOCK_SIZE, self.network.backend)
        ids = Tensor(np.concatenate([np.asarray(piece, np.int32) for piece in pieces]))
        try:
            out = self.network(ids, *inputs.values(), *(self.caches or ())).asnumpy()
        except RuntimeError as error:
            if self._cut > 1 and any(name in str(error) for name in ("AllReduce", "AllGather")):
                raise RankLostError(f"the ranks that hold the model did not meet: {str(error).splitlines()[0]}") from None
            raise
        return out.reshape(-1, self.config.vocab_size)

    def _request(self, index: int, ids: Sequence[int], settings: GenerationSettings, stream: int) -> Request:
        """For no more new tokens than the model has positions left."""
        self._check_prompt(ids)
        most = min(settings.max_new_tokens, self.config.max_position_embeddings - len(ids))
        return Request(index, tuple(ids), most, settings.generator(stream))

    def _prompt_ids(self, prompt: Any, mode: str) -> list[int]:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if prompt and isinstance(prompt[0], dict):
            return self.tokenizer.encode_chat(prompt, mode=mode)
        return [int(token) for token in prompt]

    def _check_prompt(self, ids: Sequence[int]) -> None:
        limit = self.config.max_position_embeddings
        if not 1 <= len(ids) <= limit:
            raise RequestError(f"prompt: got {len(ids)} tokens, wanted 1 to {limit} (the model's max_position_embeddings)")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise RequestError(f"prompt: token ids from {min(ids)} to {max(ids)}, wanted 0 to {self.config.vocab_size - 1}")

    def _stop_ids(self) -> frozenset[int]:
        tokenizer = self._found_tokenizer()
        return end_ids(self.directory) if tokenizer is None else tokenizer.end_ids

    @cached_property
    def _barred_ids(self) -> NDArray[np.bool_] | None:
        tokenizer = self._found_tokenizer()
        return None if tokenizer is None else tokenizer.without_token(self.config.vocab_size)

    def _generation(self, request: Request, completion: Completion) -> Generation:
        ids = completion.token_ids
        tokenizer = self._found_tokenizer()
        if tokenizer is None:
            return Generation("", None, "", ids, len(request.prompt), completion.finish_reason, end_id=completion.end_id)
        found = Generation.of(tokenizer, ids, len(request.prompt), completion.finish_reason, completion.stopped_by)
        return replace(found, end_id=completion.end_id)


def in_order(answers: Iterable[tuple[int, Generation]]) -> list[Generation]:
    """What Model.stream() gives, in the order of the prompts."""
    return [answer for _, answer in sorted(answers, key=operator.itemgetter(0))]
