"""checkpoint/writer.py: killed anywhere and resumed, the bytes are those of an undisturbed run; others are safe."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ms_pangu_quant.api import read_data
from ms_pangu_quant.checkpoint import writer as writer_module
from ms_pangu_quant.checkpoint.files import INDEX_FILE, TensorFiles, write_safetensors
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer
from ms_pangu_quant.checkpoint.writer import CARRIED_OVER, HASHES_FILE, JOURNAL, QuantizedWriter, hash_file
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import CheckpointError, OutputError
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.pipeline import output as keeping
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe

BLOCKS = 3
FINGERPRINT = {"checkpoint": "c0ffee", "recipe": "abc", "calibration data": "none"}
FILES = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, BLOCKS + 2)]
JSON_FILES = {"config.json": {"model_type": "PanguEmbedded"}, "report.json": {"blocks": 3}}


def tensors(index):
    generator = np.random.default_rng(index)
    prefix = f"model.layers.{index}."
    return {
        f"{prefix}weight": generator.integers(-127, 128, (8, 16)).astype(np.int8),
        f"{prefix}weight_scale": generator.lognormal(size=8).astype(np.float32),
    }


def begin(output, *, resume=False, **changes):
    return QuantizedWriter(output, {**FINGERPRINT, **changes}, blocks=BLOCKS, resume=resume)


def write(writer, until=BLOCKS):
    for index in range(writer.finished, until):
        writer.write_block(tensors(index), {"index": index, "output_error": index / 8})


def write_whole(out, finish, *, until=BLOCKS, before_more=lambda: None):
    """A run that does something by hand after its first `until` blocks."""
    with begin(out) as writer:
        write(writer, until)
        before_more()
        write(writer)
        finish(writer)


def stop():
    raise KeyboardInterrupt


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def source(make_checkpoint) -> Path:
    """A float checkpoint with some of the files that are carried over."""
    directory = make_checkpoint("source")
    for name in ("tokenizer.model", "tokenizer_config.json", "modeling_openpangu_dense.py"):
        (directory / name).write_text(f"this is {name}")
    return directory


@pytest.fixture
def finish(source):
    """writer -> the value of finish()."""
    entries = TensorFiles(source).entries
    outer = {name: entries[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    return lambda writer: writer.finish(outer, source, JSON_FILES)


@pytest.fixture
def undisturbed(tmp_path, finish) -> dict[str, bytes]:
    with begin(tmp_path / "undisturbed") as writer:
        write(writer)
        finish(writer)
    return contents(tmp_path / "undisturbed")


def test_a_finished_directory_holds_what_a_loader_wants(tmp_path, source, finish):
    out = tmp_path / "deep" / "out"
    with begin(out) as writer:
        write(writer)
        assert writer.reports == [{"index": index, "output_error": index / 8} for index in range(BLOCKS)]
        hashes = writer.hashes()
        size = finish(writer)
    assert set(contents(out)) == {
        *FILES,
        HASHES_FILE,
        INDEX_FILE,
        "config.json",
        "report.json",
        "generation_config.json",
        "modeling_openpangu_dense.py",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    for index in range(BLOCKS):
        stored = load_file(out / FILES[index])
        assert stored.keys() == tensors(index).keys()
        assert all(stored[name].tobytes() == tensor.tobytes() for name, tensor in tensors(index).items())
    float_tensors = load_file(source / "model.safetensors")
    outer = load_file(out / FILES[-1])
    assert sorted(outer) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert all(outer[name].tobytes() == float_tensors[name].tobytes() for name in outer)
    weight_map = json.loads((out / INDEX_FILE).read_text())["weight_map"]
    assert weight_map == {name: file for file in FILES for name in load_file(out / file)}
    assert hashes == {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in FILES[:-1]}
    assert size == sum((out / file).stat().st_size for file in FILES)
    assert json.loads((out / "config.json").read_text()) == JSON_FILES["config.json"]
    assert len(TensorFiles(out).entries) == 2 * BLOCKS + 2


def test_sha256sum_finds_every_file_as_it_was_written(tmp_path, finish):
    with begin(tmp_path / "out") as writer:
        write(writer)
        finish(writer)
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", HASHES_FILE], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    listed = {line.split(":")[0] for line in checked.stdout.splitlines()}
    assert listed == contents(tmp_path / "out").keys() - {HASHES_FILE}


@pytest.mark.parametrize(("limit", "files"), [(1 << 30, 1), (1000, 2), (1, 2)])
def test_what_is_outside_the_blocks_is_split_at_the_shard_size(tmp_path, finish, monkeypatch, limit, files):
    monkeypatch.setattr(writer_module, "SHARD_BYTES", limit)
    with begin(tmp_path / "out") as writer:
        write(writer)
        finish(writer)
    outer = sorted(path.name for path in (tmp_path / "out").glob("model-00004-*"))
    assert len(outer) == files
    entries = TensorFiles(tmp_path / "out").entries  # checks the index against the files
    assert len(entries) == 2 * BLOCKS + 2
    for name in outer:
        held = [entry.nbytes for entry in entries.values() if entry.file.name == name]
        assert sum(held) <= limit or len(held) == 1


def test_the_tokenizer_generation_settings_and_code_are_carried_over_and_no_more(tmp_path, source, finish):
    """The code that auto_map names, and what goes by transformers' names; as bytes, whatever they hold."""
    change(
        source / "config.json", auto_map={"AutoConfig": "pangu_settings.Config", "AutoModel": "other/repository--far.Model"}
    )
    code = (
        "modeling_openpangu_dense.py",
        "configuration_openpangu_dense.py",
        "tokenization_openpangu.py",
        "pangu_settings.py",
    )
    for name in (*CARRIED_OVER, *code, "far.py", "setup.py", "notes.txt"):
        (source / name).write_bytes(b"raise SystemExit(" + name.encode() + b")\xff")
    with begin(tmp_path / "out") as writer:
        write(writer)
        finish(writer)
    carried = contents(tmp_path / "out").keys() & contents(source).keys() - {"config.json"}
    assert carried == {*CARRIED_OVER, *code}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in carried)


@pytest.fixture
def model(tmp_path, checkpoint_tool, mini):
    """A float checkpoint with the embedded one's tokenizer, and without what says how to generate."""
    config = checkpoint_tool.make_config("tiny", layers=1, vocab_size=1024) | {"eos_token_id": 4, "pad_token_id": 0}
    checkpoint_tool.write_checkpoint(tmp_path / "model", config, seed=0, dtype="bfloat16")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(mini / name, tmp_path / "model" / name)
    (tmp_path / "model" / "generation_config.json").unlink()
    return tmp_path / "model"


def quantized(model, output):
    quantize(CheckpointReader(model), load_recipe(find_recipe("w8a8_rtn")), output)
    return output


def change(path, **values):
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "written"),
    [
        (None, 4, "[unused10]", None),  # transformers looks into config.json
        (None, [4, 9], "[unused10]", None),
        (None, 4, "</s>", {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [4, 2]}),
        (None, None, "[unused10]", {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 4}),
        ({"eos_token_id": [4, 2], "top_k": 5}, 4, "</s>", "as it is"),
        ({"eos_token_id": [9, 5000]}, [4, 2], "</s>", {"eos_token_id": [9, 5000, 2, 4]}),
        ({"eos_token_id": 2, "temperature": 0.6}, [4, 2], "</s>", {"eos_token_id": [2, 4], "temperature": 0.6}),
        ({"temperature": 0.6}, 4, "[unused10]", {"temperature": 0.6, "eos_token_id": 4}),
    ],
)
def test_all_that_ends_an_answer_is_in_every_output(model, tmp_path, generation, config, tokenizer, written):
    change(model / "config.json", eos_token_id=config, bos_token_id=1)
    change(model / "tokenizer_config.json", eos_token=tokenizer)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation, indent=7))
    out = quantized(model, tmp_path / "out")
    for name, stored_as in FORMATS.items():
        export(QuantizedReader(out), stored_as, tmp_path / name)
        assert Tokenizer(tmp_path / name).end_ids == Tokenizer(model).end_ids
        found = tmp_path / name / "generation_config.json"
        if written == "as it is":
            assert found.read_bytes() == (model / "generation_config.json").read_bytes()
        else:
            assert (json.loads(found.read_text()) if found.exists() else None) == written
        assert not verify(tmp_path / name).faults


def test_a_tokenizer_that_cannot_be_used_leaves_the_ends_that_the_configs_name(model, tmp_path):
    (model / "tokenizer.model").write_bytes(b"?")
    change(model / "config.json", eos_token_id=[4, 9])
    change(model / "generation_config.json", eos_token_id=2)
    out = quantized(model, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 4, 9]}
    assert (out / "tokenizer.model").read_bytes() == b"?"


def test_the_templates_of_a_folder_are_carried_over_and_verified(model, tmp_path):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "default.jinja").write_text("{{ bos_token }}{{ messages[0].content }}!")
    (model / "additional_chat_templates" / "notes.txt").write_text("x")
    out = quantized(model, tmp_path / "out")
    assert Tokenizer(out).render_chat([{"role": "user", "content": "a"}]) == "<s>a!"
    assert [path.name for path in (out / "additional_chat_templates").iterdir()] == ["default.jinja"]
    assert not verify(out).faults
    (out / "additional_chat_templates" / "default.jinja").write_text("{{ 1 }}")
    assert any("default.jinja: is not the file that was written" in fault for fault in verify(out).faults)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer.model", b"?", "tokenizer.model: these 1 bytes are not a sentencepiece model"),
        ("chat_template.jinja", b"{% if %}", "chat_template.jinja: chat_template is not a jinja2 template"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        ("special_tokens_map.json", b"{}", None),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_told_before_it_is_copied(model, tmp_path, capsys, name, content, told):
    (model / name).write_bytes(content)
    (tmp_path / "ids.jsonl").write_text('{"token_ids": [1, 2, 3]}\n{"token_ids": [4, 5]}')
    out, exported, calibration = tmp_path / "out", tmp_path / "exported", tmp_path / "ids.jsonl"
    for command in (
        ["quantize", str(model), "--recipe", "w8a8_rtn", "--output", str(out), "--dry-run"],
        ["quantize", str(model), "--recipe", "w8a8_rtn", "--output", str(out), "--calibration", str(calibration)],
        ["export", str(out), "--format", "ascend", "--output", str(exported)],
    ):
        assert main(command) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("the tokenizer cannot be used, and stays as it is" in said) == (told is not None)
        assert told is None or told in said
    assert (exported / name).read_bytes() == content


def test_rows_that_need_a_tokenizer_are_refused_with_what_is_wrong_with_it(model, tmp_path):
    (model / "tokenizer.model").write_bytes(b"?")
    (tmp_path / "ids.jsonl").write_text('{"token_ids": [1, 2, 3]}')
    (tmp_path / "text.jsonl").write_text('{"text": "a b"}')
    config = CheckpointReader(model).config
    assert [*map(list, read_data(tmp_path / "ids.jsonl", model, config, None, 64, None).sequences)] == [[1, 2, 3]]
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: these 1 bytes are not a sentencepiece model"):
        read_data(tmp_path / "text.jsonl", model, config, None, 64, None)


@pytest.mark.parametrize("done", range(BLOCKS + 1))
def test_a_run_that_stopped_after_any_block_is_resumed_to_the_same_bytes(tmp_path, finish, undisturbed, done):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_whole(out, finish, until=done, before_more=stop)
    assert not (out / "config.json").exists()
    assert not (out / INDEX_FILE).exists()
    kept = {name: (out / name).stat().st_ino for name in FILES[:done]}
    with begin(out, resume=True) as writer:
        assert writer.finished == done
        assert [report["index"] for report in writer.reports] == list(range(done))
        assert {name: (out / name).stat().st_ino for name in FILES[:done]} == kept  # not written again
        write(writer)
        finish(writer)
    assert contents(out) == undisturbed


@pytest.mark.parametrize("failing", ["report.json", INDEX_FILE, "config.json"])
def test_a_run_that_failed_while_finishing_is_resumed_and_config_json_comes_last(tmp_path, finish, undisturbed, failing):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=failing):  # no file can take the name of a directory
        write_whole(out, finish, before_more=(out / failing).mkdir)
    assert not (out / "config.json").is_file()
    (out / failing).rmdir()
    with begin(out, resume=True) as writer:
        assert writer.finished == BLOCKS
        finish(writer)
    assert contents(out) == undisturbed


def test_a_run_killed_between_config_json_and_its_last_step_is_resumed(tmp_path, finish, undisturbed, monkeypatch):
    out = tmp_path / "out"
    unlink = Path.unlink

    def killed(path, *arguments, **settings):
        if path.name == JOURNAL:
            stop()
        unlink(path, *arguments, **settings)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(out, finish)
    monkeypatch.undo()
    with begin(out, resume=True) as writer:
        assert writer.finished == BLOCKS
        finish(writer)
    assert contents(out) == undisturbed


@pytest.mark.parametrize("damage", ["deleted", "truncated", "one bit"])
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_damaged_block_and_those_after_it_are_written_again(tmp_path, finish, undisturbed, block, damage):
    out = tmp_path / "out"
    with begin(out) as writer:
        write(writer)
    file = out / FILES[block]
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "truncated":
        file.write_bytes(data[:-1])
    elif damage == "one bit":
        data[-1] ^= 1
        file.write_bytes(data)
    with begin(out, resume=True) as writer:
        assert writer.finished == block
        assert len(writer.reports) == block
        write(writer)
        finish(writer)
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": "abd"}, "another recipe;"),
        ({"checkpoint": "0", "recipe": "0"}, "another checkpoint, recipe;"),
        ({"calibration data": "9"}, "another calibration data;"),
        ({"version": "2"}, "another version;"),
    ],
)
def test_a_run_with_another_fingerprint_is_refused_naming_what_changed_and_leaves_it_alone(tmp_path, changes, named):
    out = tmp_path / "out"
    with begin(out) as writer:
        write(writer, 1)
    before = contents(out)
    with pytest.raises(OutputError, match=f"^{out}: was begun with {named}"):
        begin(out, resume=True, **changes)
    assert contents(out) == before
    with begin(out, resume=True) as writer:
        assert writer.finished == 1


def test_what_is_missing_from_a_fingerprint_is_a_change_too(tmp_path):
    with begin(tmp_path / "out", version="1") as writer:
        write(writer, 1)
    with pytest.raises(OutputError, match="another version;"):
        begin(tmp_path / "out", resume=True)


def test_an_unfinished_run_is_continued_only_when_asked(tmp_path):
    out = tmp_path / "out"
    with begin(out) as writer:
        write(writer, 1)
    before = contents(out)
    with pytest.raises(OutputError, match=f"^{out}: holds an unfinished run; continue it with --resume"):
        begin(out)
    assert contents(out) == before


def test_hidden_states_that_are_not_whole_are_not_gone_on_with(tmp_path):
    rng = np.random.default_rng(0)
    states = {name: rng.normal(size=(5, 3)).astype(np.float32) for name in ("quantized", "float")}
    file = tmp_path / ".states-00000-0of1.safetensors"
    assert keeping._read_states(file) is None
    write_safetensors(file, {**states, keeping._DIGEST: keeping._digest(states)})
    found = keeping._read_states(file)
    assert found.keys() == states.keys()
    assert all(np.array_equal(found[name], states[name]) for name in states)
    whole = file.read_bytes()
    for place in (-1, -40, -100, 12):
        raw = bytearray(whole)
        raw[place] ^= 1
        file.write_bytes(raw)
        assert keeping._read_states(file) is None, place
    for size in (0, 20, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert keeping._read_states(file) is None, size


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_its_first_block_was_entered_is_begun_anew(resume, tmp_path, finish, undisturbed):
    out = tmp_path / "out"
    with begin(tmp_path / "other", version="1") as writer:
        journal = contents(tmp_path / "other")
    out.mkdir()
    for name, value in journal.items():
        (out / name).write_bytes(value)
    (out / "model-00001-of-00099.safetensors").write_bytes(b"of a longer model")
    with begin(out, resume=resume) as writer:
        write(writer)
        finish(writer)
    assert contents(out) == undisturbed


def test_resuming_where_there_is_nothing_begins(tmp_path, finish, undisturbed):
    with begin(tmp_path / "out", resume=True) as writer:
        assert writer.finished == 0
        write(writer)
        finish(writer)
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.json", "holds a finished checkpoint; choose another"),
        ("notes.txt", r"is not empty \(it holds notes\.txt\); choose another"),
        ("model.safetensors", r"is not empty \(it holds model\.safetensors\)"),
    ],
)
def test_a_directory_that_holds_anything_else_is_refused_and_left_alone(tmp_path, resume, file, said):
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_text("mine")
    with pytest.raises(OutputError, match=f"^{out}: {said}"):
        begin(out, resume=resume)
    assert contents(out) == {file: b"mine"}


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_checkpoint_is_refused_and_left_alone(tmp_path, finish, undisturbed, resume):
    out = tmp_path / "undisturbed"
    with pytest.raises(OutputError, match="holds a finished checkpoint"):
        begin(out, resume=resume)
    assert contents(out) == undisturbed


def test_an_empty_directory_is_used_and_not_removed(tmp_path):
    with begin(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_a_run_that_wrote_no_block_leaves_no_directory_that_it_made_itself(tmp_path):
    """So that a run that failed before it did anything does not ask for --resume the next time."""
    with contextlib.suppress(KeyboardInterrupt), begin(tmp_path / "out"):
        stop()
    assert not (tmp_path / "out").exists()


def test_a_directory_whose_journal_could_not_be_written_is_removed_again(tmp_path, monkeypatch):
    def full(*names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        begin(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_write_left_is_removed(tmp_path):
    out = tmp_path / "out"
    with begin(out) as writer:
        write(writer, 1)
    (out / f".{FILES[1]}.partial").write_bytes(b"half a block")
    with begin(out, resume=True) as writer:
        assert writer.finished == 1
    assert set(contents(out)) == {FILES[0], JOURNAL}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"fingerprint": 3, "blocks": []}',
        b'{"fingerprint": {}, "blocks": null}',
        b'{"fingerprint": FP, "blocks": [7]}',
        b'{"fingerprint": FP, "blocks": [{}]}',
    ],
)
def test_a_damaged_journal_is_refused_by_name(tmp_path, content):
    out = tmp_path / "out"
    with begin(out) as writer:
        write(writer, 1)
    (out / JOURNAL).write_bytes(content.replace(b"FP", json.dumps(FINGERPRINT).encode()))
    with pytest.raises(OutputError, match=JOURNAL):
        begin(out, resume=True)


def test_a_second_writer_is_refused_while_the_first_is_open_and_accepted_after(tmp_path):
    out = tmp_path / "out"
    with begin(out) as first:
        write(first, 1)
        before = contents(out)
        for resume in (False, True):
            with pytest.raises(OutputError, match=f"^{out}: another process is writing here"):
                begin(out, resume=resume)
        assert contents(out) == before
        write(first, 2)
    with begin(out, resume=True) as second:
        assert second.finished == 2


def test_a_refused_writer_holds_no_lock(tmp_path):
    out = tmp_path / "out"
    with begin(out) as writer:
        write(writer, 1)
    for _ in range(3):
        with pytest.raises(OutputError, match="another recipe"):
            begin(out, resume=True, recipe="other")
    with begin(out, resume=True) as writer:
        assert writer.finished == 1


@pytest.fixture
def other_process(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that has written one block to tmp_path/out and would go on."""
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_writer import begin, write
writer = begin(Path({str(tmp_path / "out")!r}))
write(writer, 1)
print("ready", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_directory_another_process_writes_to_is_free_when_that_is_killed(tmp_path, other_process, finish, undisturbed):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="another process is writing here"):
        begin(out, resume=True)
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with begin(out, resume=True) as writer:
        assert writer.finished == 1
        write(writer)
        finish(writer)
    assert contents(out) == undisturbed


@pytest.mark.parametrize("file", [FILES[1], JOURNAL])
def test_a_full_disk_ends_the_run_with_an_output_error_and_what_was_done_is_kept(tmp_path, finish, undisturbed, file):
    """/dev/full answers every write as a full disk does."""
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=rf"{file}: cannot write \(No space left on device\).*--resume"):
        write_whole(out, finish, until=1, before_more=lambda: (out / f".{file}.partial").symlink_to("/dev/full"))
    assert not list(out.glob(".*.partial"))
    assert not (out / "config.json").exists()
    assert (FILES[1] in contents(out)) == (file == JOURNAL)
    with begin(out, resume=True) as writer:
        assert writer.finished == 1
        write(writer)
        finish(writer)
    assert contents(out) == undisturbed


def test_a_full_disk_while_the_tokenizer_is_copied_is_an_output_error(tmp_path, finish):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"tokenizer\.model: cannot write \(No space left on device\)"):
        write_whole(out, finish, before_more=lambda: (out / "tokenizer.model").symlink_to("/dev/full"))
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("place", ["file", "file/out", "/proc/out", "x" * 300], ids=lambda place: place[:9])
def test_a_place_where_no_directory_can_be_made_is_refused(tmp_path, place):
    """A name that is too long stands for all that stat() cannot look at, such as what lies in another user's home."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=f"^{tmp_path / place}: cannot write here"):
        begin(tmp_path / place)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the next test mounts a read-only disk instead")
def test_a_directory_without_write_permission_is_an_output_error(tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        begin(tmp_path / "out")


@pytest.fixture
def remount(tmp_path) -> Iterator[tuple[Path, object]]:
    """A small disk of its own, and a function that makes it read-only or writable."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a disk needs root")
    yield disk, lambda mode: subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_read_only_disk_is_an_output_error_from_the_start_and_in_the_middle(remount):
    disk, switch = remount
    (disk / "empty").mkdir()
    with begin(disk / "out") as writer:
        write(writer, 1)
        switch("ro")
        with pytest.raises(OutputError, match="Read-only file system"):
            write(writer)
    for path in (disk / "out", disk / "empty", disk / "new"):
        with pytest.raises(OutputError, match="Read-only file system"):
            begin(path, resume=True)
    switch("rw")
    with begin(disk / "out", resume=True) as writer:
        assert writer.finished == 1


def test_a_small_disk_that_fills_up_keeps_the_blocks_that_fit(remount):
    disk, _ = remount
    large = {"model.layers.0.weight": np.zeros(400_000, np.int8)}
    with begin(disk / "out") as writer:
        writer.write_block(large, {})
        writer.write_block(large, {})
        with pytest.raises(OutputError, match="No space left on device"):
            writer.write_block(large, {})
    assert sorted(contents(disk / "out")) == [JOURNAL, *FILES[:2]]
    with begin(disk / "out", resume=True) as writer:
        assert writer.finished == 2


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"x" * 100_000).hexdigest()
