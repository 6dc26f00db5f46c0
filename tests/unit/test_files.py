"""checkpoint/files.py: tensors are read exactly, damage is named, and a file is written whole or not at all."""

import hashlib
import json
import math
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint import files
from ms_pangu_quant.checkpoint.files import (
    INDEX_FILE,
    TensorFiles,
    chunks,
    json_bytes,
    json_text,
    write_atomically,
    write_json,
    write_safetensors,
)
from ms_pangu_quant.errors import CheckpointError, OutputError

BFLOAT16 = ml_dtypes.bfloat16


def write_index(directory, weight_map):
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def header_of(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + length])


@pytest.fixture
def sharded(make_checkpoint):
    """A checkpoint in several files with an index, and the names of its files."""
    directory = make_checkpoint(shard_bytes=60_000)
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(names) > 2
    return directory, names


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_float_there_is_is_widened_exactly(tmp_path, dtype):
    values = np.arange(65536, dtype=np.uint16).view(dtype).reshape(256, 256)
    save_file({"all": values}, tmp_path / "model.safetensors")
    read = TensorFiles(tmp_path).read_float32("all")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(read), np.signbit(values.astype(np.float32)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_of_each_dtype_equals_what_safetensors_reads(make_checkpoint, dtype):
    directory = make_checkpoint(dtype=dtype)
    opened = TensorFiles(directory)
    wanted = load_file(directory / "model.safetensors")
    assert opened.entries.keys() == wanted.keys()
    for name, tensor in wanted.items():
        entry = opened.entries[name]
        assert (entry.shape, entry.dtype.name, entry.nbytes) == (tensor.shape, tensor.dtype.name, tensor.nbytes)
        assert entry.read().tobytes() == tensor.tobytes()
        np.testing.assert_array_equal(opened.read_float32(name), tensor.astype(np.float32))
    assert opened.nbytes == sum(tensor.nbytes for tensor in wanted.values())


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_, BFLOAT16])
def test_every_dtype_is_read_back_in_its_own_dtype(tmp_path, dtype):
    tensors = {
        "matrix": np.arange(-6, 6).reshape(3, 4).astype(dtype),
        "scalar": np.array(1, dtype),
        "empty": np.empty((0, 5), dtype),
        "no_columns": np.empty((5, 0), dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    opened = TensorFiles(tmp_path)
    for name, tensor in tensors.items():
        read = opened.entries[name].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 7), (0, None), (2, 5), (6, None), (3, 3), (5, 2), (0, 100), (7, None), (9, 12)]
)
def test_rows_are_those_of_the_whole_tensor(tmp_path, start, stop):
    values = np.arange(84, dtype=np.float32).reshape(7, 3, 4)
    others = {"before": np.ones(5, np.int8), "after": np.ones(3, np.int8)}
    save_file({**others, "rows": values}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(TensorFiles(tmp_path).read_float32("rows", start, stop), values[start:stop])


def test_reading_rows_does_not_read_the_rest(tmp_path):
    save_file({"table": np.zeros((4096, 1024), np.float32)}, tmp_path / "model.safetensors")
    opened = TensorFiles(tmp_path)
    tracemalloc.start()
    opened.read_float32("table", 100, 102)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # the tensor has 16 MiB


def test_several_files_are_one_checkpoint_with_or_without_an_index(make_checkpoint, sharded):
    directory, names = sharded
    whole = TensorFiles(make_checkpoint("whole"))
    for opened in (TensorFiles(directory), (directory / INDEX_FILE).unlink() or TensorFiles(directory)):
        assert [file.name for file in opened.files] == names
        assert opened.entries.keys() == whole.entries.keys()
        assert all((opened.read_float32(name) == whole.read_float32(name)).all() for name in whole.entries)
        assert opened.nbytes == whole.nbytes


def test_links_into_a_hugging_face_cache_are_followed(make_checkpoint, tmp_path):
    directory = make_checkpoint()
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    (directory / "model.safetensors").rename(blob)
    (directory / "model.safetensors").symlink_to(blob)
    assert len(TensorFiles(directory).entries) == 28


def test_one_file_can_be_opened_whatever_the_index_says(sharded):
    directory, names = sharded
    opened = TensorFiles(directory, only=directory / names[1])
    assert set(opened.entries) == set(load_file(directory / names[1]))


def test_an_absent_file_that_the_index_names_is_refused_by_name(sharded):
    directory, names = sharded
    (directory / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: names {names[1]}, which is not in the directory"):
        TensorFiles(directory)


def test_a_tensor_in_another_file_than_the_index_says_is_refused_naming_all_three(sharded):
    directory, names = sharded
    weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    name = next(tensor for tensor, file in weight_map.items() if file == names[0])
    write_index(directory, {**weight_map, name: names[2]})
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: {name} should be in {names[2]}, but it is in {names[0]}"):
        TensorFiles(directory)


def test_a_tensor_that_only_the_index_has_and_one_that_it_lacks_are_refused(sharded):
    directory, names = sharded
    weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    write_index(directory, {**weight_map, "model.extra": names[0]})
    with pytest.raises(CheckpointError, match=rf"model\.extra should be in {names[0]}, but it is in no file"):
        TensorFiles(directory)
    name, file = weight_map.popitem()
    write_index(directory, weight_map)
    with pytest.raises(CheckpointError, match=f"{file}: {name} is not in {INDEX_FILE}"):
        TensorFiles(directory)


def put_into(directory, source, target, change):
    """The first tensor of one file into another too, changed."""
    tensors = load_file(directory / target)
    name, value = next(iter(load_file(directory / source).items()))
    save_file({**tensors, name: change(value)}, directory / target)
    return name


DIFFERENT = {
    "values": lambda value: value * 2,
    "a last value": lambda value: np.concatenate([value.reshape(-1)[:-1], value.reshape(-1)[-1:] * 2]).reshape(value.shape),
    "shape": lambda value: value[:1],
    "kind": lambda value: np.ones(value.shape, np.int8),
}


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("change", DIFFERENT)
def test_another_tensor_of_the_same_name_in_two_files_is_refused_naming_both(sharded, change, indexed):
    directory, names = sharded
    if not indexed:
        (directory / INDEX_FILE).unlink()
    for source, target in ((2, 0), (0, 2)):
        kept = (directory / names[target]).read_bytes()
        name = put_into(directory, names[source], names[target], DIFFERENT[change])
        with pytest.raises(
            CheckpointError, match=f"{directory}: {name} is in both {names[0]} and {names[2]}, with other values; delete"
        ):
            TensorFiles(directory)
        (directory / names[target]).write_bytes(kept)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["same dtype", "wider"])
def test_the_same_tensor_in_two_files_is_one_and_the_index_says_where(sharded, indexed, dtype):
    directory, names = sharded
    before = TensorFiles(directory)
    digest, values = before.sha256(), {each: before.read_float32(each) for each in before.entries}
    if not indexed:
        (directory / INDEX_FILE).unlink()
    name = put_into(directory, names[2], names[0], lambda value: value.astype(dtype))
    opened = TensorFiles(directory)
    assert opened.entries.keys() == before.entries.keys()
    assert opened.entries[name].file.name == names[2 if indexed else 0]
    np.testing.assert_array_equal(opened.read_float32(name), values[name])
    if indexed:
        assert opened.sha256() == digest


def test_a_buffer_that_only_one_of_index_and_files_knows_is_no_contradiction(sharded):
    directory, names = sharded
    weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    write_index(directory, {**weight_map, "model.layers.0.self_attn.rotary_emb.inv_freq": names[0]})
    buffer = {"model.rotary_emb.inv_freq": np.ones(8, np.float32)}
    save_file({**load_file(directory / names[0]), **buffer}, directory / names[0])
    assert TensorFiles(directory).entries.keys() == {*weight_map, *buffer}


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "{absolute}",
        "sub/inside.safetensors",
        "./model.safetensors",
        "..",
        "",
        "config.json",
        "model.safetensors\0",
    ],
)
def test_an_index_that_names_anything_but_a_safetensors_file_beside_it_is_refused(make_checkpoint, tmp_path, name):
    """Each of these files exists and is readable; a hostile index must not reach it."""
    directory = make_checkpoint()
    tensors = load_file(directory / "model.safetensors")
    (directory / "sub").mkdir()
    for file in (tmp_path / "outside.safetensors", directory / "sub/inside.safetensors"):
        save_file(tensors, file)
    write_index(directory, dict.fromkeys(tensors, name.format(absolute=tmp_path / "outside.safetensors")))
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        TensorFiles(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
        b"[" * 100_000,
    ],
    ids=lambda content: content[:30],
)
def test_an_index_that_is_no_index_is_refused(make_checkpoint, content):
    directory = make_checkpoint()
    (directory / INDEX_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(directory)):
        TensorFiles(directory)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused_before_anything_is_read(make_checkpoint, keep):
    file = make_checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"^{file}: damaged or not a safetensors file .*download it again"):
        TensorFiles(file.parent)


PAGE = r"it is a web page \(a login or proxy page\?\); download it again$"


@pytest.mark.parametrize(
    ("content", "todo"),
    [
        (b"not safetensors at all, but long enough", r"\); download it again$"),
        (b"\xff" * 64, r"\); download it again$"),
        (b"\0" * 64, r"\); download it again$"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "; run git lfs pull$"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", PAGE),
        (b"\xef\xbb\xbf\r\n  <HTML lang=en>", PAGE),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", PAGE),
    ],
    ids=lambda content: str(content)[:20],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content, todo):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: damaged or not a safetensors file \(.*{todo}"):
        TensorFiles(tmp_path)


def test_a_directory_and_a_dangling_link_in_place_of_a_file_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/model.safetensors").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two/model.safetensors").symlink_to(tmp_path / "gone")
    for name, todo in (("one", ""), ("two", rf".*a link to {tmp_path}/gone, which is not there: copy .* \(cp -rL\)$")):
        with pytest.raises(CheckpointError, match=f"{name}/model.safetensors{todo}"):
            TensorFiles(tmp_path / name)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file here; wanted a Hugging Face checkpoint"):
        TensorFiles(tmp_path)


def test_a_dtype_numpy_does_not_have_is_refused_by_name(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w: dtype F8_E4M3 is not supported"):
        TensorFiles(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(make_checkpoint):
    directory = make_checkpoint(num_hidden_layers=1)
    opened = TensorFiles(directory)
    last = max(opened.entries.values(), key=lambda entry: entry.offset)
    with open(last.file, "r+b") as stream:
        stream.truncate(last.offset + last.nbytes - 2)
    with pytest.raises(CheckpointError, match="ends early"):
        last.read()
    with pytest.raises(CheckpointError, match="ends early"):
        list(chunks(last))


def test_an_index_that_was_not_downloaded_says_what_to_do(make_checkpoint):
    directory = make_checkpoint()
    for content, todo in ((b"version https://git-lfs.github.com/spec/v1\n", "; run git lfs pull$"), (b"<html>", PAGE)):
        (directory / INDEX_FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: not a safetensors index .*{todo}"):
            TensorFiles(directory)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_an_index_as_windows_editors_save_it_is_read(sharded, encoding):
    directory, names = sharded
    index = directory / INDEX_FILE
    index.write_bytes(index.read_text().encode(encoding))
    assert [file.name for file in TensorFiles(directory).files] == names


def check(directory, expected, optional=()):
    TensorFiles(directory).check(expected, optional=optional)


def test_check_names_tensor_found_and_wanted(tmp_path):
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, BFLOAT16)}, tmp_path / "model.safetensors")
    check(tmp_path, {"a": (2, 3), "b": (4,)})
    check(tmp_path, {"a": (2, 3)}, optional=["b", "c"])
    with pytest.raises(CheckpointError, match=r"c is missing; config\.json implies a tensor of shape \[7, 5\]$"):
        check(tmp_path, {"a": (2, 3), "b": (4,), "c": (7, 5)})
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: a: got \[2, 3\], config\.json implies \[3, 2\]; "
        r"is config\.json from another checkpoint",
    ):
        check(tmp_path, {"a": (3, 2), "b": (4,)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: b: not a tensor of the model"):
        check(tmp_path, {"a": (2, 3)})
    with pytest.raises(CheckpointError, match="a and 1 more: not a tensor"):
        check(tmp_path, {})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_check_asks_of_an_integer_tensor_whether_it_is_quantized_already(tmp_path, dtype):
    save_file({"a": np.ones((2, 3), dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a: got \w+, wanted a floating-point .*quantized already\?"):
        check(tmp_path, {"a": (2, 3)})


def test_the_hash_covers_every_tensor_byte_and_reports_progress(sharded):
    directory, names = sharded
    seen = []
    before = TensorFiles(directory).sha256(seen.append)
    assert sum(seen) == TensorFiles(directory).nbytes
    for name in names:
        data = bytearray((directory / name).read_bytes())
        data[-1] ^= 1
        (directory / name).write_bytes(data)
        assert TensorFiles(directory).sha256() != before
        data[-1] ^= 1
        (directory / name).write_bytes(data)
    assert TensorFiles(directory).sha256() == before


def test_the_hash_is_of_the_tensors_and_not_of_how_they_are_spread_over_files(sharded, tmp_path):
    directory, names = sharded
    before = TensorFiles(directory).sha256()
    (directory / INDEX_FILE).unlink()
    for letter, name in zip("cab", names, strict=False):
        (directory / name).rename(directory / f"model-{letter}.safetensors")
    assert TensorFiles(directory).sha256() == before
    tensors = {name: entry.read() for name, entry in TensorFiles(directory).entries.items()}
    name, value = next((name, value) for name, value in tensors.items() if value.ndim == 2)
    others = {
        "same": tensors,
        "renamed": {f"{name}.x" if each == name else each: tensor for each, tensor in tensors.items()},
        "reshaped": {**tensors, name: np.ascontiguousarray(value).reshape(value.shape[0] * 2, -1)},
        "of another type": {**tensors, name: np.ascontiguousarray(value).view(np.int16)},
    }
    hashes = {}
    for kind, changed in others.items():
        (tmp_path / kind).mkdir()
        save_file(changed, tmp_path / kind / "model.safetensors")
        hashes[kind] = TensorFiles(tmp_path / kind).sha256()
    assert hashes["same"] == before
    assert len(set(hashes.values())) == len(hashes)


def written_tensors():
    generator = np.random.default_rng(0)
    return {
        "float32": generator.normal(size=(3, 5)).astype(np.float32),
        "bfloat16": generator.normal(size=7).astype(BFLOAT16),
        "int8": np.arange(-8, 7, dtype=np.int8).reshape(3, 5),
        "int32": np.arange(3, dtype=np.int32),
        "uint8": np.arange(5, dtype=np.uint8),
        "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "strided": np.arange(12, dtype=np.int8)[::2],
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 2), np.float32),
    }


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    tensors = written_tensors()
    result = write_safetensors(tmp_path / "out.safetensors", tensors)
    read = load_file(tmp_path / "out.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype.name, read[name].shape) == (tensor.dtype.name, tensor.shape), name
        assert read[name].tobytes() == tensor.tobytes(), name
    data = (tmp_path / "out.safetensors").read_bytes()
    assert result.sha256 == hashlib.sha256(data).hexdigest()
    assert result.nbytes == len(data)
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0  # tensors are aligned
    assert header_of(tmp_path / "out.safetensors")["__metadata__"] == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_tensor_is_copied_byte_for_byte_in_pieces_of_any_size(make_checkpoint, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    source = TensorFiles(make_checkpoint(num_hidden_layers=1, vocab_size=8, hidden_size=8, intermediate_size=8))
    write_safetensors(tmp_path / "copy.safetensors", {**source.entries, "new": np.ones(3, np.int8)})
    read, wanted = load_file(tmp_path / "copy.safetensors"), load_file(source.files[0])
    assert read.pop("new").tolist() == [1, 1, 1]
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (read[name].dtype, read[name].tobytes()) == (tensor.dtype, tensor.tobytes())
    entry = next(iter(source.entries.values()))
    row = entry.nbytes // entry.shape[0]
    assert all(len(piece) <= max(chunk, row) for piece in chunks(entry))


def test_copying_a_large_tensor_does_not_load_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 1 << 16)
    save_file({"large": np.zeros(1 << 22, np.float32)}, tmp_path / "model.safetensors")
    entries = TensorFiles(tmp_path).entries
    tracemalloc.start()
    write_safetensors(tmp_path / "copy.safetensors", entries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # the tensor has 16 MiB


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """/dev/full answers every write as a full disk does."""
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    (tmp_path / ".file.bin.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=rf"^{target}: cannot write \(No space left on device\); free space"):
        write_atomically(target, [b"new" * 100_000])
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_name_that_cannot_be_taken_leaves_nothing_half_written(tmp_path):
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken", tmp_path / "absent/file"):
        with pytest.raises(OutputError, match="cannot write"):
            write_atomically(path, [b"new"])
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_failure_whose_cleaning_up_fails_too_is_still_an_output_error(tmp_path):
    """As on a disk that became read-only: neither open nor unlink works there. Here the name is too long for both."""
    with pytest.raises(OutputError, match=r"cannot write \(File name too long\)"):
        write_atomically(tmp_path / ("x" * 250), [b"new"])
    assert not list(tmp_path.iterdir())


def test_a_file_has_its_name_only_when_it_is_whole_and_an_interruption_leaves_nothing(tmp_path):
    target = tmp_path / "file.bin"

    def pieces():
        yield b"first"
        assert not target.exists()
        yield b"second"

    write_atomically(target, pieces())
    assert target.read_bytes() == b"firstsecond"

    def interrupted():
        yield b"first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, interrupted())
    assert target.read_bytes() == b"firstsecond"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_source_that_ends_early_leaves_no_copy(make_checkpoint, tmp_path):
    source = TensorFiles(make_checkpoint(num_hidden_layers=1))
    os.truncate(source.files[0], source.files[0].stat().st_size - 100)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="ends early"):
        write_safetensors(out / "copy.safetensors", source.entries)
    assert not list(out.iterdir())


def test_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("sync") or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or replace(*names))
    write_atomically(tmp_path / "file", [b"data"])
    assert done == ["sync", "rename"]


def test_what_json_does_not_have_is_null_wherever_it_stands():
    worst = {"a": [1.5, math.inf, (-math.inf, {"b": math.nan, "c": "NaN"})], "d": np.float64("nan"), "e": 1e308, "f": True}
    plain = {"a": [1.5, None, [None, {"b": None, "c": "NaN"}]], "d": None, "e": 1e308, "f": True}
    for indent in (None, 2):
        assert json.loads(json_text(worst, indent=indent), parse_constant=pytest.fail) == plain
        assert json_text(plain, indent=indent) == json.dumps(plain, indent=indent)
    assert json.loads(json_bytes(worst), parse_constant=pytest.fail) == plain


def test_all_json_that_is_written_or_printed_is_made_in_one_place():
    """Elsewhere json.dumps makes what is hashed, sent to the sandbox or parsed again."""
    package = Path(files.__file__).parents[1]
    inside = {"evaluation/tasks/plus.py", "evaluation/score.py", "evaluation/run.py", "evaluation/sandbox.py", "api.py"}
    inside |= {"evaluation/guest/tester.py", "evaluation/guest/server.py", "pipeline/prepare.py", "recipe/settings.py"}
    inside |= {"checkpoint/chat.py", "checkpoint/files.py", "chats/job.py", "chats/prompts.py", "inference/endpoint.py"}
    inside |= {"tune/history.py", "tune/job.py"}
    makers = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "json.dump" in path.read_text(encoding="utf-8")
    }
    assert makers == inside


def test_json_is_readable_by_people_and_keeps_its_order(tmp_path):
    value = {"b": "用户：", "a": [1, 2]}
    result = write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["b", "a"]
    assert json.loads(text) == value
    assert "用户：" in text
    assert text.endswith("}\n")
    assert result.nbytes == len(text.encode())
