"""Who computes which scheme in which format, and how: what `inspect --servable` prints and `export` refuses by.

Every row was read in the source it names, at the versions it names; none was run on an NPU or a GPU. The first row of a
consumer that applies to a checkpoint decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.formats.linear import FLOAT, KINDS

INTEGER = "integer GEMM"
MEMORY = "float GEMM, weights small in memory only"
DEQUANTIZED = "float GEMM on dequantized weights"
REFUSES = "does not load it"
WRONG = "loads it wrongly"
UNKNOWN = "not known"
INT8_CACHE = "int8 cache"
FLOAT_CACHE = "float cache"
SERVED = (INTEGER, MEMORY, INT8_CACHE)

_W8 = ("W8A8", "W8A8_DYNAMIC")
_W4 = ("W4A8_DYNAMIC",)
_C8 = (kv_cache.KIND,)
_MF = "mindformers/parallel_core/inference/quantization/golden_stick"
_VA = "vllm_ascend/quantization"


@dataclass(frozen=True)
class Facts:
    """What a row's condition asks of the layers of one kind; the kind of an int8 key/value cache is kv_cache.KIND.

    group_size 0 is per channel; biased: any has a bias; online_hadamard: as in ModelConfig.
    """

    kind: str
    group_size: int
    biased: bool
    online_hadamard: bool = False


@dataclass(frozen=True)
class Row:
    """`verdict` for layers of `kinds` in `format`, if they are biased / grouped so / of these group sizes (None: any)."""

    format: str
    kinds: tuple[str, ...]
    consumer: str
    versions: str
    verdict: str
    note: str
    source: str
    biased: bool | None = None
    group_sizes: tuple[int, ...] | None = None

    def applies(self, facts: Facts) -> bool:
        return (
            facts.kind in self.kinds
            and self.biased in (None, facts.biased)
            and (self.group_sizes is None or facts.group_size in self.group_sizes)
        )


ROWS: tuple[Row, ...] = (
    Row("mindformers", KINDS, "ms_pangu_quant (CPU)", "this", INTEGER, "exact integer products", "backends/cpu.py"),
    Row(
        "mindformers", _W8, "ms_pangu_quant (Ascend)", "this", INTEGER,
        "as MindFormers; never run on an NPU, see docs/ascend.md", "backends/ascend.py",
    ),
    Row(
        "mindformers", _W4, "ms_pangu_quant (Ascend)", "this", INTEGER,
        "GroupedMatmulV4; never run on an NPU, see docs/ascend.md", "backends/ascend.py", group_sizes=(0, 256),
    ),
    Row(
        "mindformers", _W4, "ms_pangu_quant (Ascend)", "this", MEMORY,
        "W4A16, activations stay float; never run on an NPU, see docs/ascend.md", "backends/ascend.py",
    ),
    Row(
        "mindformers", _W8, "MindFormers", "1.8 - 2.1", INTEGER,
        "QuantV2 or DynamicQuantExt, then QuantBatchMatmul; needs PanguEmbedded registered (import "
        "ms_pangu_quant.network.pangu)", f"{_MF}/a8w8.py, a8dynw8.py",
    ),
    Row(
        "mindformers", _W4, "MindFormers", "1.8 - 2.1", REFUSES,
        "ValueError: 'A8W4DynamicQuant is now only support for MOE'", f"{_MF}/a8dynw4.py",
    ),
    Row(
        "mindformers", _W8, "vLLM-MindSpore", "0.5.1", INTEGER,
        "as MindFormers, with this package installed beside it; never run on an NPU, see docs/serving.md",
        "ms_pangu_quant/serving.py",
    ),
    Row(
        "mindformers", _W4, "vLLM-MindSpore", "0.5.1", INTEGER,
        "GroupedMatmulV4, with this package installed beside it; never run on an NPU, see docs/serving.md",
        "ms_pangu_quant/serving.py", group_sizes=(0, 256),
    ),
    Row(
        "mindformers", _W4, "vLLM-MindSpore", "0.5.1", MEMORY,
        "W4A16, with this package installed beside it; never run on an NPU, see docs/serving.md",
        "ms_pangu_quant/serving.py",
    ),
    Row(
        "ascend", _W8, "vllm-ascend", "main of 2026-08", INTEGER,
        "npu_quant_matmul; scales are held in the network's dtype", f"{_VA}/methods/w8a8_static.py, w8a8_dynamic.py",
    ),
    Row(
        "ascend", _W4, "vllm-ascend", "<= 0.23", REFUSES,
        "per channel: divides by group_size 0; the scheme was removed after 0.23 (PR 13713)", f"{_VA}/methods/w4a8.py",
        group_sizes=(0,),
    ),
    Row(
        "ascend", _W4, "vllm-ascend", "<= 0.23", WRONG,
        "the layer's bias is not added; the scheme was removed after 0.23 (PR 13713)", f"{_VA}/methods/w4a8.py, apply()",
        biased=True,
    ),
    Row(
        "ascend", _W4, "vllm-ascend", "<= 0.23", MEMORY,
        "activations stay float (npu_weight_quant_batchmatmul); removed after 0.23 (PR 13713)",
        f"{_VA}/methods/w4a8.py, apply()", group_sizes=(64, 128),
    ),
    Row(
        "ascend", _W4, "vllm-ascend", "<= 0.23", REFUSES,
        "its kernel takes groups of 64 and 128 only (issues 5603, 10834)", "vllm-ascend issues 5603, 10834",
    ),
    Row(
        "ascend", ("W8A8",), "MindFormers", "1.8 - 2.1", WRONG,
        "the bias is in quant_bias and is added again; use the mindformers format", f"{_MF}/a8w8.py, apply()", biased=True,
    ),
    Row("ascend", _W8, "MindFormers", "1.8 - 2.1", INTEGER, "as quantization 'ascend'", f"{_MF}/a8w8.py, a8dynw8.py"),
    Row(
        "ascend", _W4, "MindFormers", "1.8 - 2.1", REFUSES,
        "ValueError: 'A8W4DynamicQuant is now only support for MOE'", f"{_MF}/a8dynw4.py",
    ),
    Row("ascend", KINDS, "MindIE", "-", UNKNOWN, "msModelSlim names it as a reader; its source is not public", "-"),
    Row(
        "compressed-tensors", _W8, "vLLM", "after 0.11.0", INTEGER, "int8 kernels of CUDA and CPU",
        "vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py",
    ),
    Row(
        "compressed-tensors", _W4, "vLLM", "after 0.11.0", INTEGER,
        "on CPUs (PyTorch's dynamic 4-bit kernel; group scales become bfloat16); on GPUs activations stay float (38066)",
        "vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a8_int.py",
    ),
    Row(
        "compressed-tensors", _W8, "vllm-ascend", "main of 2026-08", INTEGER, "npu_quant_matmul",
        f"{_VA}/compressed_tensors_config.py",
    ),
    Row(
        "compressed-tensors", _W4, "vllm-ascend", "main of 2026-08", REFUSES, "for experts only",
        f"{_VA}/compressed_tensors_config.py",
    ),
    Row(
        "compressed-tensors", KINDS, "transformers", "4.57", DEQUANTIZED, "the library decompresses when it loads",
        "transformers/quantizers/quantizer_compressed_tensors.py",
    ),
    Row(
        "mindformers", _C8, "ms_pangu_quant (CPU)", "this", INT8_CACHE, "prefill attends to the codes too",
        "backends/cpu.py",
    ),
    Row(
        "mindformers", _C8, "ms_pangu_quant (Ascend)", "this", INT8_CACHE,
        "QuantV2, then PagedAttention with antiquant scales; prefill attends to floats; never run on an NPU, see "
        "docs/kv_cache.md", "backends/ascend.py",
    ),
    Row(
        "mindformers", _C8, "MindFormers", "1.8 - 2.1", FLOAT_CACHE, "has no int8 cache and passes over the scales",
        "mindformers/parallel_core/inference/base_models/gpt/gpt_model.py, load_weights()",
    ),
    Row(
        "mindformers", _C8, "vLLM-MindSpore", "0.5.1", FLOAT_CACHE,
        "allocates the cache itself, in the network's dtype; the scales are passed over", "ms_pangu_quant/serving.py",
    ),
    Row(
        "ascend", _C8, "vllm-ascend", "main of 2026-09", INT8_CACHE,
        "from kv_cache_type C8; zero points must be 0 where it keeps the cache in NZ; that its openPangu model loads the "
        "scales was not checked", f"{_VA}/modelslim_config.py, methods/kv_c8.py",
    ),
    Row(
        "ascend", _C8, "MindFormers", "1.8 - 2.1", FLOAT_CACHE, "has no int8 cache and passes over the scales",
        "mindformers/parallel_core/inference/base_models/gpt/gpt_model.py, load_weights()",
    ),
    Row(
        "ascend", _C8, "MindIE", "-", UNKNOWN,
        "documents C8 with W8A8 for float16 LLaMA3.1 and Qwen2; its source is not public", "MindIE LLM, KV Cache int8",
    ),
    Row(
        "compressed-tensors", _C8, "vLLM", "after 0.11.0", REFUSES,
        "float8 caches with a scale for a tensor or a head only, so the format is refused",
        "docs/features/quantization/quantized_kvcache.md",
    ),
)  # fmt: skip


def facts_of(config: ModelConfig, kinds: Mapping[str, str], group_size: int, int8_cache: bool = False) -> tuple[Facts, ...]:
    """One for each kind that occurs; kinds: weight name -> kind."""
    found = []
    for kind in KINDS:
        sites = [site for site in layout.SITES if any(name.endswith(f"{site.name}.weight") for name in _of(kind, kinds))]
        if sites:
            biased = any(layout.has_bias(config, site) for site in sites)
            size = group_size if kind == "W4A8_DYNAMIC" else 0
            found.append(Facts(kind, size, biased, config.online_hadamard))
    if int8_cache:
        found.append(Facts(kv_cache.KIND, 0, False, config.online_hadamard))
    return tuple(found)


def _of(kind: str, kinds: Mapping[str, str]) -> Iterable[str]:
    return (name for name, found in kinds.items() if found == kind != FLOAT)


def rows_for(stored_as: str, facts: Facts) -> list[Row]:
    """One row for each consumer that this project knows of. None but itself knows its online Hadamard."""
    found: dict[str, Row] = {}
    for row in ROWS:
        if row.format == stored_as and row.applies(facts):
            if facts.online_hadamard and not row.consumer.startswith("ms_pangu_quant"):
                row = replace(row, verdict=REFUSES, note="has no Hadamard matrix in front of down_proj", source="-")
            found.setdefault(row.consumer, row)
    return list(found.values())


def check_served(stored_as: str, facts: Iterable[Facts]) -> None:
    """Raises RequestError if no consumer would compute one of the kinds from this format."""
    for each in facts:
        rows = rows_for(stored_as, each)
        if any(row.verdict in SERVED for row in rows):
            continue
        formats = sorted({row.format for row in ROWS})
        others = [name for name in formats if any(row.verdict in SERVED for row in rows_for(name, each))]
        reasons = "; ".join(f"{row.consumer} {row.versions} {row.verdict}: {row.note}" for row in rows)
        scheme = "an int8 key/value cache" if each.kind == kv_cache.KIND else each.kind
        scheme = f"{each.kind} in groups of {each.group_size}" if each.group_size else scheme
        what = f"{scheme}{' with biases' if each.biased else ''} in the {stored_as} format"
        at_all = "" if each.kind == kv_cache.KIND else ", or --allow-unserved to write it all the same"
        raise RequestError(f"{what}: no program computes it ({reasons}); use --format {' or '.join(others)}{at_all}")
