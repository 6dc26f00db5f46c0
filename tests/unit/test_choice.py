"""checkpoint/choice.py: which files are the model, and that the user is told where others could have been meant."""

import json
import shutil
import warnings
from itertools import combinations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint.choice import INDEX_FILE, WHOLE_FILE, choose, weight_files
from ms_pangu_quant.checkpoint.files import CheckpointNote, TensorFiles
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli import _notes_shown
from ms_pangu_quant.errors import CheckpointError

NONE_OF_IT = (
    *("adapter_model.safetensors", "adapter_0.safetensors", "pytorch_lora_weights.safetensors"),
    *("optimizer.safetensors", "optimizer-0.safetensors", "optim.safetensors", "scheduler.safetensors"),
    *("rng_state_0.safetensors", "random_states_0.safetensors", "training_args.safetensors", "trainer_state.safetensors"),
    *("consolidated.safetensors", "consolidated.00.safetensors", "consolidated-00001-of-00002.safetensors"),
)
HIDDEN = ("._model.safetensors", ".model.safetensors", "._model-00001-of-00002.safetensors", ".x.safetensors")


def shards(folder, count, *, stem="model", first=1, rest="", scale=1.0):
    """model.safetensors of a folder once more, in so many shards; their names."""
    tensors = load_file(folder / WHOLE_FILE)
    names = [f"{stem}-{number + first:05d}-of-{count:05d}{rest}.safetensors" for number in range(count)]
    for number, name in enumerate(names):
        part = [*tensors][number * len(tensors) // count : (number + 1) * len(tensors) // count]
        save_file({each: (tensors[each] * scale).astype(tensors[each].dtype) for each in part}, folder / name)
    return names


def index_of(folder, names):
    weight_map = {tensor: name for name in names for tensor in load_file(folder / name)}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def opened(folder):
    """(hash of the tensors, what was told of the folder)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader = CheckpointReader(folder)
    return reader.files.sha256(), [str(each.message) for each in caught if each.category is CheckpointNote]


def files_of(folder):
    return [path.name for path in choose(folder).files]


@pytest.fixture
def whole(make_checkpoint):
    """A checkpoint in one file, and its hash."""
    folder = make_checkpoint()
    return folder, opened(folder)[0]


def test_a_folder_with_one_set_has_nothing_to_tell(whole):
    folder, digest = whole
    assert opened(folder) == (digest, [])
    names = shards(folder, 3)
    (folder / WHOLE_FILE).unlink()
    assert opened(folder) == (digest, [])  # without an index too
    index_of(folder, names)
    assert opened(folder) == (digest, [])
    assert files_of(folder) == names


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_file_is_not_there(whole, name):
    folder, digest = whole
    for content in (b"\0\5\x16\7\0\2\0\0Mac OS X", (folder / WHOLE_FILE).read_bytes()):
        (folder / name).write_bytes(content)
        assert opened(folder) == (digest, [])
        (folder / WHOLE_FILE).rename(folder / "other.safetensors")
        assert opened(folder) == (digest, [])
        (folder / "other.safetensors").rename(folder / WHOLE_FILE)


@pytest.mark.parametrize("form", ["whole", "index", "shards", "other name"])
@pytest.mark.parametrize("name", NONE_OF_IT)
def test_what_is_known_to_be_something_else_is_left_out_and_named(whole, name, form):
    folder, digest = whole
    if form in ("index", "shards"):
        names = shards(folder, 2)
        (folder / WHOLE_FILE).unlink()
        if form == "index":
            index_of(folder, names)
    elif form == "other name":
        (folder / WHOLE_FILE).rename(folder / "pangu.safetensors")
    for content in (b"not even safetensors", None):
        if content is None:
            save_file({"norm.weight": np.ones(3, np.float32)}, folder / name)
        else:
            (folder / name).write_bytes(content)
        found, (note,) = opened(folder)
        assert found == digest
        assert f"what is not: {name}" in note
        assert ("merged into the weights" in note) == name.startswith(("adapter", "pytorch_lora"))


def test_a_whole_file_goes_before_an_index_and_other_sets_as_in_transformers(whole):
    folder, digest = whole
    others = {}
    for made in (lambda: shards(folder, 2, scale=3.0), lambda: shards(folder, 3)[:1], lambda: ["model.fp16.safetensors"]):
        others[len(others)] = made()
    save_file(load_file(folder / WHOLE_FILE), folder / "model.fp16.safetensors")
    index_of(folder, others[0])
    found, (note,) = opened(folder)
    assert found == digest
    assert f"{folder}: {WHOLE_FILE} is read" in note
    assert INDEX_FILE in note
    for name in others[0]:
        (folder / name).unlink()  # and its index is stale
    assert opened(folder)[0] == digest


def test_an_index_that_names_the_whole_file_is_its_own(whole):
    folder, digest = whole
    index_of(folder, [WHOLE_FILE])
    assert opened(folder) == (digest, [])


@pytest.mark.parametrize(("count", "first"), [(1, 1), (2, 1), (3, 0)])
@pytest.mark.parametrize(("stem", "rest"), [("model", ""), ("model", ".fp16"), ("pangu-7b", "")])
def test_a_set_of_shards_is_read_without_an_index_and_its_gaps_are_named(whole, count, first, stem, rest):
    folder, digest = whole
    names = shards(folder, count, stem=stem, first=first, rest=rest)
    (folder / WHOLE_FILE).unlink()
    assert opened(folder) == (digest, [])
    for lost in (name for size in range(1, count) for name in combinations(names, size)):
        copy = shutil.copytree(folder, folder.parent / "copy")
        for name in lost:
            (copy / name).unlink()
        wanted = stem if first == 0 and lost[0] == names[0] else lost[0]  # without its 0 it seems counted from 1
        with pytest.raises(CheckpointError, match=f"{copy}: {wanted}.* is missing, of .* there\\); download it$"):
            CheckpointReader(copy)
        shutil.rmtree(copy)


def test_two_sets_that_nothing_tells_apart_are_refused_naming_both(whole):
    folder, _ = whole
    two, three = shards(folder, 2), shards(folder, 3)
    (folder / WHOLE_FILE).unlink()
    for removed in ([], three[1:], two[1:] + three[:1]):
        copy = shutil.copytree(folder, folder.parent / f"copy{len(removed)}{removed[:1]}")
        for name in removed:
            (copy / name).unlink()
        with pytest.raises(CheckpointError) as raised:
            CheckpointReader(copy)
        for said in (str(copy), "model-*-of-00002.safetensors", "model-*-of-00003.safetensors", "delete all but one"):
            assert said in str(raised.value)
    index_of(folder, two)
    _, (note,) = opened(folder)
    assert "what is not: model-00001-of-00003.safetensors, model-00002-of-00003.safetensors" in note


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_two_whole_files_of_other_names_are_one_only_if_they_are_the_same(whole, scale):
    folder, digest = whole
    tensors = load_file(folder / WHOLE_FILE)
    (folder / WHOLE_FILE).rename(folder / "model.bf16.safetensors")
    save_file(
        {name: (value * scale).astype(np.float32) for name, value in tensors.items()}, folder / "model.fp32.safetensors"
    )
    if scale == 1:
        assert opened(folder)[0] == digest
    else:
        with pytest.raises(
            CheckpointError, match=r"is in both model\.bf16\.safetensors and model\.fp32\.safetensors.*delete"
        ):
            CheckpointReader(folder)


def test_files_of_any_names_that_hold_the_tensors_together_are_the_model(whole):
    folder, digest = whole
    tensors = load_file(folder / WHOLE_FILE)
    (folder / WHOLE_FILE).unlink()
    for remainder, name in enumerate(("a.safetensors", "optimized-b.safetensors", "scheduler_free.safetensors"[9:])):
        part = {each: tensors[each] for number, each in enumerate(tensors) if number % 3 == remainder}
        save_file(part, folder / name)
    assert opened(folder) == (digest, [])


def test_an_index_of_what_is_gone_says_what_to_do(whole):
    folder, _ = whole
    names = shards(folder, 3)
    index_of(folder, names)
    (folder / WHOLE_FILE).unlink()
    for name in names[1:]:
        (folder / name).unlink()
    wanted = f"{INDEX_FILE}: names {names[1]} and 1 more, which is not in the directory; download it"
    with pytest.raises(CheckpointError, match=wanted):
        CheckpointReader(folder)
    (folder / names[0]).rename(folder / "pangu.safetensors")
    with pytest.raises(CheckpointError, match=r"or delete the index if pangu\.safetensors is the model"):
        CheckpointReader(folder)


def test_a_fault_of_what_was_chosen_names_what_was_left_out(whole):
    folder, _ = whole
    shards(folder, 2)
    (folder / WHOLE_FILE).write_bytes((folder / WHOLE_FILE).read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"damaged.*beside it lies what is not: model-00001-of-00002\.safetensors"):
        TensorFiles(folder)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "model.gguf", "MODEL.SAFETENSORS", "._model.safetensors"]
)
def test_a_folder_without_a_model_says_what_it_holds(whole, name):
    folder, _ = whole
    (folder / WHOLE_FILE).rename(folder / name)
    said = {
        "adapter_model.safetensors": "holds an adapter .* and no model; merge it",
        "optimizer.safetensors": r"no \*\.safetensors file here with a model, only optimizer\.safetensors",
        "MODEL.SAFETENSORS": r"no \*\.safetensors file here with a model, only MODEL\.SAFETENSORS",
        "model.gguf": r"no \*\.safetensors file here with a model, only model\.gguf",
    }
    with pytest.raises(CheckpointError, match=f"{folder}: {said.get(name, 'no .*safetensors file here; wanted')}"):
        CheckpointReader(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin, a pickle"):
        CheckpointReader(folder)
    assert weight_files(folder) == []


def test_the_only_weights_are_read_under_their_makers_name(whole):
    folder, digest = whole
    (folder / WHOLE_FILE).rename(folder / "consolidated.safetensors")
    assert opened(folder) == (digest, [])


def test_a_command_shows_each_note_once_in_a_line(whole, capsys):
    folder, _ = whole
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with _notes_shown():
        for _ in range(3):
            CheckpointReader(folder)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert line.startswith(f"note: {folder}: {WHOLE_FILE} is read")
