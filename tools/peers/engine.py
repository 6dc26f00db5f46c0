"""One engine of bench.py in a process of its own: reads a request a line, answers each with a line of JSON.

Request   {"ids": [...], "steps": n, "logits": path or null}: forget the last prompt, prefill this one, decode n tokens, the
          largest logit first. The last prompt token's logits are written to path (.npy, float32 [vocab]).
Answer    {"prefill": seconds, "decode": [seconds of each step], "rss_gib": peak resident memory}

Runs in the interpreter that has the engine; imports this project only for its own engine.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 1024  # tokens of every engine's cache


class Ours:
    def __init__(self, directory: str, threads: int, head: str) -> None:
        from ms_pangu_quant.inference.model import BLOCK_SIZE, load

        self.model = load(directory, kv_cache_tokens=CONTEXT, head=head)
        self.table = [list(range(CONTEXT // BLOCK_SIZE))]
        self.cached = 0

    def prefill(self, ids: list[int]) -> np.ndarray:
        self.cached = len(ids)
        return self.model.forward([ids], [0], self.table, phase="prefill")[0]

    def decode(self, token: int) -> np.ndarray:
        logits = self.model.forward([[token]], [self.cached], self.table, phase="decode")[0]
        self.cached += 1
        return logits


class Torch:
    """Hugging Face's Llama, which has openPangu's biases as attention_bias; dtype float32, bfloat16 or int8 (dynamic)."""

    def __init__(self, directory: str, threads: int, dtype: str) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(threads)
        raw = json.loads((Path(directory) / "config.json").read_text())
        config = LlamaConfig(
            **{key: raw[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            **{key: raw[key] for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")},
            tie_word_embeddings=raw["tie_word_embeddings"],
            max_position_embeddings=raw["max_position_embeddings"],
            attention_bias=raw["bias"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        weights = {}
        for file in sorted(Path(directory).glob("*.safetensors")):
            weights |= {name: tensor.to(wanted) for name, tensor in load_file(file).items()}
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, assign=True, strict=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights
        model.eval()
        if dtype == "int8":
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

            blocks = {torch.nn.Linear: per_channel_dynamic_qconfig}
            model.model = quantize_dynamic(model.model, blocks, inplace=True)  # the head stays float, as ours
        self.torch, self.model, self.cache = torch, model, None

    def prefill(self, ids: list[int]) -> np.ndarray:
        self.cache = None
        return self._run(ids)

    def decode(self, token: int) -> np.ndarray:
        return self._run([token])

    def _run(self, ids: list[int]) -> np.ndarray:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[0, -1].float().numpy()


class LlamaCpp:
    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, CONTEXT, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def prefill(self, ids: list[int]) -> np.ndarray:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self._run(ids)

    def decode(self, token: int) -> np.ndarray:
        return self._run([token])

    def _run(self, ids: list[int]) -> np.ndarray:
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocab,)).copy()


def write_gguf(directory: str, file: str) -> None:
    """The checkpoint in bfloat16 as llama.cpp's architecture "llama", biases included.

    llama.cpp rotates neighbouring channels where openPangu rotates halves, so the rows of query and key are reordered, as
    its own converter does. There is no tokenizer: tokens go in as ids.
    """
    import gguf
    import torch
    from safetensors import safe_open

    raw = json.loads((Path(directory) / "config.json").read_text())
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    dim = raw.get("head_dim") or raw["hidden_size"] // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, raw["num_hidden_layers"])
    for source in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(source, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                value = stored.get_tensor(name).to(torch.float32).numpy()
                if ".q_proj." in name or ".k_proj." in name:
                    count = heads if ".q_proj." in name else kv_heads
                    value = value.reshape(count, 2, dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
                target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if value.ndim == 1:
                    writer.add_tensor(target, value)
                else:
                    kind = gguf.GGMLQuantizationType.BF16
                    writer.add_tensor(target, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: str, file: str, kind: str, threads: int) -> None:
    """llama.cpp's own quantizer. kind "Q8_0", "Q4_0", or one with "+bf16" for a table of embedding and head in bfloat16."""
    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    name, _, table = kind.partition("+")
    params.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[name]
    params.nthread = threads
    if table:
        params.output_tensor_type = params.token_embedding_type = gguf.GGMLQuantizationType.BF16.value
    if llama_cpp.llama_model_quantize(source.encode(), file.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind}")


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    logits = engine.prefill(request["ids"])
    prefill, steps = time.perf_counter() - started, []
    if request["logits"]:
        np.save(request["logits"], logits.astype(np.float32))
    for _ in range(request["steps"]):
        token = int(logits.argmax())
        started = time.perf_counter()
        logits = engine.decode(token)
        steps.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"prefill": prefill, "decode": steps, "rss_gib": peak}


def main() -> None:
    kind, path, threads, *rest = sys.argv[1:]
    if kind == "write-gguf":
        return write_gguf(path, rest[0])
    if kind == "quantize-gguf":
        return quantize_gguf(path, rest[0], rest[1], int(threads))
    engine: Any = {"ours": Ours, "torch": Torch, "llama.cpp": LlamaCpp}[kind](path, int(threads), *rest)
    out = sys.stdout
    sys.stdout = sys.stderr
    print("{}", file=out, flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=out, flush=True)
    return None


if __name__ == "__main__":
    main()
