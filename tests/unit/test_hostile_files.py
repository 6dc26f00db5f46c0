"""Files from anywhere: whatever is in them, reading ends in a value or in one clear error, soon and in little memory.

Each case damages one file of a valid directory: bytes flipped, cut, repeated or put in; or, of JSON and YAML, a value
replaced by another kind of value, a key removed, added or doubled. Cases are numbered, so that a failure can be run again.
"""

import json
import random
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from ms_pangu_quant.calibration.data import load_token_data
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, QUANTIZATION_FILE
from ms_pangu_quant.checkpoint.files import INDEX_FILE
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer, completed_generation
from ms_pangu_quant.checkpoint.writer import HASHES_FILE, JOURNAL, REPORT_FILE, QuantizedWriter
from ms_pangu_quant.errors import CheckpointError, PanguQuantError
from ms_pangu_quant.evaluation.provenance import of_checkpoint
from ms_pangu_quant.evaluation.score import load_samples
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.formats import ascend
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.finished import finished_report
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader, open_checkpoint
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.mixed.sensitivity import Sensitivity
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from ms_pangu_quant.report.inspection import inspection
from ms_pangu_quant.report.results import load_runs
from ms_pangu_quant.report.speed import load_speeds
from tests.unit.test_report import make as make_results
from tests.unit.test_sensitivity import sensitivity
from tests.unit.test_training import fused, sliced, tensor_parallel

TEMPLATE = """{% set year = strftime_now('%Y') %}
{%- macro turn(role, text) %}[unused9]{{ role | trim }}：{{ text }}[unused10]
{% endmacro %}{% set ns = namespace(system=false, at=0) %}
{%- for message in messages %}{% if message.role == 'system' %}{% set ns.system = true %}{% endif %}
{%- set ns.at = ns.at + 1 * loop.index0 %}{% if message['role'] not in ['user', 'assistant'] %}
{{- raise_exception('roles: ' ~ message | tojson(indent=2)) }}{% endif %}
{%- generation %}{{ turn(message.role, message.content.split('</think>')[-1].strip()) }}{% endgeneration %}
{%- if loop.index0 > 99 %}{% break %}{% endif %}{% endfor %}
{%- if add_generation_prompt and not ns.system %}{{ bos_token[:0] + '[unused9]assistant' }}{{ '=' * 3 }}{% endif %}"""

SECONDS, BYTES = 10.0, 1 << 30
VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
          "../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [[]], {"": {}}, [None] * 3, "9" * 5000,
          "%s{0}{{ 7*7 }}"]  # fmt: skip


def damage_bytes(source: bytes, chance: random.Random) -> bytes:
    data = bytearray(source)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 2:
                data[at:at] = bytes(chance.choice((b"\0" * 16, b"\xff" * 8, b'"', b"{", b"9" * 40, b"\xed\xa0\x80")))
            case 3:
                piece = data[at : at + chance.randrange(1, 64)]
                data[at:at] = piece * chance.choice((1, 50))
            case 4:
                data[:8] = chance.randrange(2**64).to_bytes(8, "little")  # a safetensors file's header length
    return bytes(data)


def damage_value(value, chance: random.Random):
    """A copy of a JSON value with one place in it replaced, removed, added or renamed."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.8:
        copy = value.copy()
        keys = list(copy) if isinstance(copy, dict) else range(len(copy))
        key = chance.choice(list(keys))
        match chance.randrange(6):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[chance.choice(("", "../x", "a" * 3000, str(key) + "x"))] = copy.pop(key)
            case _:
                copy[key] = damage_value(copy[key], chance)
        return copy
    return chance.choice(VALUES)


def dumped(value) -> bytes:
    return json.dumps(value).encode()


def damaged(path: Path, chance: random.Random) -> bytes:
    source = path.read_bytes()
    if path.suffix == ".safetensors" and chance.random() < 0.6:  # a header that is JSON, but hostile
        length = int.from_bytes(source[:8], "little")
        header = dumped(damage_value(json.loads(source[8 : 8 + length]), chance))
        return len(header).to_bytes(8, "little") + header + source[8 + length :]
    if path.suffix in (".json", ".jsonl", ".yaml") and chance.random() < 0.7:
        if path.suffix == ".jsonl":
            lines = source.splitlines()
            at = chance.randrange(len(lines))
            lines[at] = dumped(damage_value(json.loads(lines[at]), chance))
            return b"\n".join(lines)
        value = damage_value(yaml.safe_load(source), chance)
        return dumped(value) if path.suffix == ".json" else yaml.safe_dump(value).encode("utf-8", "surrogatepass")
    return damage_bytes(source, chance)


@pytest.fixture(scope="module")
def places(tmp_path_factory, checkpoint_tool, mini, root):
    """Name -> (folder that is copied for each case, the file in it to damage, what reads it)."""
    base = tmp_path_factory.mktemp("hostile")
    config = checkpoint_tool.make_config("tiny", layers=1)
    checkpoint_tool.write_checkpoint(base / "float", config, seed=0, dtype="bfloat16", shard_bytes=60_000)
    quantize(CheckpointReader(base / "float"), load_recipe(find_recipe("w4a8_rtn")), base / "quantized")
    (base / "chat").mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(mini / name, base / "chat" / name)
    (base / "fast").mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copyfile(mini / name, base / "fast" / name)
    write_fast(base / "fast")
    (base / "template").mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(mini / name, base / "template" / name)
    write_templates(base / "template")
    (base / "recipe").mkdir()
    shutil.copyfile(root / "configs/w8a8.yaml", base / "recipe" / "recipe.yaml")
    (base / "data").mkdir()
    rows = [{"text": "one two three"}, {"text": "four five"}, {"text": "six"}]
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 2
    user = {"role": "user", "id": "1", "content": [{"type": "text", "text": "hi", "image_url": None}], "name": None}
    answer = {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [], "weight": 1}
    rich = [{"messages": [user, answer | {"content": "ho"}], "tools": None}, {"messages": [user, answer]}] * 3
    (base / "data" / "rich.jsonl").write_text("\n".join(map(json.dumps, rich)))
    (base / "data" / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (base / "data" / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (base / "data" / "ids.jsonl").write_text('{"token_ids": [1, 2, 3]}\n{"token_ids": [4, 5]}')
    shard = next((base / "float").glob("*.safetensors")).name
    stored = next((base / "quantized").glob("*.safetensors")).name
    tokenizer = Tokenizer(mini)

    def read_checkpoint(folder):
        reader = open_checkpoint(folder)
        reader.rounded_block(0)

    def read_tokenizer(folder):
        found = Tokenizer(folder)
        ids = found.encode_chat([{"role": "user", "content": "Write f(x). 中文"}], mode="no_think")
        found.decode(ids, skip_special_tokens=True)
        found.without_token(2000)
        completed_generation(folder)
        found.split_thought(ids)

    def read_data(name):
        return lambda folder: load_token_data(folder / name, tokenizer=tokenizer, vocab_size=1024, max_length=64)

    readers = {
        "config": ("float", "config.json", read_checkpoint),
        "index": ("float", INDEX_FILE, read_checkpoint),
        "safetensors": ("float", shard, read_checkpoint),
        "description": ("quantized", QUANTIZATION_FILE, read_checkpoint),
        "quantized config": ("quantized", "config.json", read_checkpoint),
        "quantized safetensors": ("quantized", stored, read_checkpoint),
        "tokenizer model": ("chat", "tokenizer.model", read_tokenizer),
        "tokenizer config": ("chat", "tokenizer_config.json", read_tokenizer),
        "special tokens": ("chat", "special_tokens_map.json", read_tokenizer),
        "tokenizer json": ("fast", "tokenizer.json", read_tokenizer),
        "fast tokenizer's config": ("fast", "tokenizer_config.json", read_tokenizer),
        "added tokens": ("template", "added_tokens.json", read_tokenizer),
        "generation config": ("template", "generation_config.json", read_tokenizer),
        "template": ("template", "chat_template.jinja", read_tokenizer),
        "older template": ("older template", "chat_template.json", read_tokenizer),
        "recipe": ("recipe", "recipe.yaml", lambda folder: load_recipe(folder / "recipe.yaml")),
        "text": ("data", "text.jsonl", read_data("text.jsonl")),
        "chats": ("data", "chats.jsonl", read_data("chats.jsonl")),
        "chats with more": ("data", "rich.jsonl", read_data("rich.jsonl")),
        "token ids": ("data", "ids.jsonl", read_data("ids.jsonl")),
        **newer_places(base, root),
    }
    return {name: (base / folder, file, read) for name, (folder, file, read) in readers.items()}


def write_fast(folder):
    """A tokenizer.json of bytes and of the tokens that the configuration beside it names."""
    made = Backend(models.BPE({letter: at for at, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    made.add_special_tokens(["<s>", "<unk>", "[unused9]", "[unused10]", "[unused16]", "[unused17]"])
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    made.save(str(folder / "tokenizer.json"))


def write_odd(folder, tensors, config):
    """A tied model as a wrapper saves it, with rope's buffers, a head, another set of weights, and an index."""
    folder.mkdir()
    (folder / "config.json").write_bytes(dumped(config))
    found = {f"_orig_mod.base_model.model.{name}": tensors.read_float32(name) for name in tensors.entries}
    found["_orig_mod.base_model.model.lm_head.weight"] = tensors.read_float32("model.embed_tokens.weight")
    frequencies = config["rope_theta"] ** -(np.arange(0, 16, 2, np.float32) / 16)
    found["_orig_mod.base_model.model.model.rotary_emb.inv_freq"] = frequencies
    found["_orig_mod.base_model.model.model.rotary_emb.cos_cached"] = np.cos(
        np.outer(np.arange(4), np.tile(frequencies, 2))
    )
    save_file(found, folder / "model.safetensors")
    save_file({"a": np.ones(3)}, folder / "model-00001-of-00002.safetensors")
    (folder / INDEX_FILE).write_bytes(dumped({"weight_map": dict.fromkeys(found, "model.safetensors")}))


def write_templates(folder):
    """A template with all that templates use, and beside it a folder that has it in the file of older processors."""
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "added_tokens.json").write_bytes(dumped({"[x]": 700, "[PAD]": 1024, "[y]": 701}))
    (folder / "generation_config.json").write_bytes(dumped({"eos_token_id": [4, 9], "pad_token_id": 1024}))
    older = shutil.copytree(folder, folder.with_name("older template"))
    (older / "chat_template.jinja").unlink()
    names = json.loads((older / "tokenizer_config.json").read_bytes())
    del names["chat_template"]
    (older / "tokenizer_config.json").write_bytes(dumped(names))
    (older / "chat_template.json").write_bytes(dumped({"chat_template": {"tool_use": "-", "default": TEMPLATE}}))


def newer_places(base, root):
    """What else is read: training's slices, another format, what quantize, evaluate, bench and sensitivity write."""
    reader = QuantizedReader(base / "quantized")
    export(reader, ascend, base / "ascend")
    tensors = CheckpointReader(base / "float").files
    config = CheckpointReader(base / "float").config.raw
    (base / "sliced").mkdir()
    shutil.copyfile(base / "float" / "config.json", base / "sliced" / "config.json")
    sliced(
        base / "sliced", fused({name: tensors.read_float32(name) for name in tensors.entries}, config), 2, tensor_parallel
    )
    (base / "budget").mkdir()
    shutil.copyfile(root / "configs/w4a8_mixed.yaml", base / "budget" / "recipe.yaml")
    sensitivity(load_recipe(base / "budget" / "recipe.yaml")).save(base / "budget" / "sensitivity.json")
    row = {"model": "quantized", "phase": "decode", "prompt_len": 64, "batch_size": 1, "latency_ms": 2.5}
    row |= {"tokens_per_s": 400.0, "spread": 0.1, "peak_rss_gib": 1.5, "limit_fraction": 0.5}
    (base / "budget" / "bench.json").write_bytes(dumped([row, {**row, "model": "float"}]))
    make_results(base, "float_results", {"mini": {"slow_think": "1100", "no_think": "0011"}})
    (base / "journal").mkdir()
    report = {"fingerprint": {"checkpoint": "x"}, "blocks": [{"file": "x", "sha256": "y", "nbytes": 1, "tensors": ["a"],
              "report": {"index": 0}}]}  # fmt: skip
    (base / "journal" / JOURNAL).write_bytes(dumped(report))
    problems = {"mini": load_problems(TASKS["mini"])}
    write_odd(base / "odd", tensors, config)

    def read_verified(folder):
        for fault in verify(folder, CheckpointReader(base / "float")).faults:
            raise CheckpointError(fault)

    def read_report(folder):
        (folder / HASHES_FILE).unlink(missing_ok=True)  # so that not its hash alone is looked at
        read_verified(folder)
        of_checkpoint(folder, "cpu")
        (folder / HASHES_FILE).write_bytes(b"")
        finished_report(folder, {"checkpoint": "x"}, FORMATS["mindformers"])

    def read_journal(folder):
        with QuantizedWriter(folder, {"checkpoint": "x"}, blocks=2, resume=True):
            pass

    return {
        "slices": ("sliced", "metadata.json", lambda folder: CheckpointReader(folder).block(0)),
        "ascend": ("ascend", ASCEND_FILE, lambda folder: open_checkpoint(folder).rounded_block(0)),
        "report": ("quantized", REPORT_FILE, read_report),
        "inspected report": ("quantized", REPORT_FILE, inspection),
        "odd safetensors": ("odd", "model.safetensors", lambda folder: CheckpointReader(folder).block(0)),
        "odd index": ("odd", INDEX_FILE, lambda folder: CheckpointReader(folder).block(0)),
        "hashes": ("quantized", HASHES_FILE, read_verified),
        "journal": ("journal", JOURNAL, read_journal),
        "budget": ("budget", "recipe.yaml", lambda folder: load_recipe(folder / "recipe.yaml")),
        "sensitivity": ("budget", "sensitivity.json", lambda folder: Sensitivity.load(folder / "sensitivity.json")),
        "bench": ("budget", "bench.json", lambda folder: load_speeds([str(folder / "bench.json")])),
        "samples": ("float_results", "samples.jsonl", lambda folder: load_samples(folder / "samples.jsonl", problems)),
        "results": ("float_results", "results.jsonl", lambda folder: load_runs([folder])),
        "summary": ("float_results", "summary.json", lambda folder: load_runs([folder])),
    }


PLACES = (
    "slices",
    "ascend",
    "report",
    "inspected report",
    "odd safetensors",
    "odd index",
    "hashes",
    "journal",
    "budget",
    "sensitivity",
    "bench",
    "samples",
    "results",
    "summary",
    "config",
    "index",
    "safetensors",
    "description",
    "quantized config",
    "quantized safetensors",
    "tokenizer model",
    "tokenizer config",
    "special tokens",
    "added tokens",
    "generation config",
    "template",
    "older template",
    "tokenizer json",
    "fast tokenizer's config",
    "recipe",
    "text",
    "chats",
    "chats with more",
    "token ids",
)


@pytest.mark.parametrize("cases", [range(40), pytest.param(range(40, 1040), marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_file_is_read_or_refused_by_name(place, cases, places, tmp_path):
    source, file, read = places[place]
    folder = shutil.copytree(source, tmp_path / "copy")
    refused, held = 0, sorted(folder.rglob("*"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in cases:
        (folder / file).write_bytes(damaged(source / file, random.Random(f"{place} {number}")))
        started, message = time.process_time(), "read"
        try:
            read(folder)
        except PanguQuantError as error:
            refused, message = refused + 1, str(error)
        except Exception as error:
            raise AssertionError(f"case {number} of {place!r}: {type(error).__name__}: {error}") from error
        assert sorted(folder.rglob("*")) in (held, sorted({*held} - {folder / HASHES_FILE})), (
            f"case {number}: wrote something"
        )
        assert message.isprintable(), f"case {number}: {message!r}"
        assert 0 < len(message) < 4000, f"case {number}: {message}"
        assert time.process_time() - started < SECONDS, f"case {number}"
    assert refused > len(cases) / 4  # else the damage is too small to say anything
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
