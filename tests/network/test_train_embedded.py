"""tools/embedded/: the training network is transformers' Llama, resuming changes no bit, outliers no logit."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from tests.conftest import MINI, golden
from tools.embedded import checkpoint, decoder, ship, train

TINY = {
    "model": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "training": {
        "steps": 4, "tokens": 640, "lengths": [320], "learning_rate": 0.01, "warmup": 2, "weight_decay": 0.05,
        "prompt_weight": 0.1,
    },
    "outliers": {"norm": [3, 16], "value": [2, 8], "up": [4, 32]},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of four steps, and its folder as it was after two of them."""
    folder = tmp_path_factory.mktemp("run")
    half = folder.parent / f"{folder.name}-half"
    trained = train.Run(TINY, folder, 0, None)
    finish = trained.save

    def save():
        finish()
        if trained.done == 2:
            shutil.copytree(folder, half)

    trained.save = save
    trained.train(every=2)
    trained.write_checkpoint()
    return SimpleNamespace(folder=folder, half=half, trained=trained)


def test_the_training_network_gives_transformers_logits():
    from mindspore import Tensor
    from safetensors.numpy import load_file

    from ms_pangu_quant.checkpoint.config import ModelConfig

    weights = {name: value.astype(np.float32) for name, value in load_file(MINI / "model.safetensors").items()}
    network = decoder.Decoder(ModelConfig.from_file(MINI / "config.json"), weights)
    values = golden("mini")
    ids = values["ids_0"].astype(np.int32)
    logits = network(Tensor(ids[None]), *network.tables(len(ids))).asnumpy()
    assert np.abs(logits[values["positions_0"]] - values["logits_0"]).max() < 1e-4


def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(run):
    again = train.Run(TINY, run.half, 0, None)
    again.resume()
    assert again.done == 2
    again.train(every=2)
    for name, value in run.trained.step.state().items():
        assert np.array_equal(value, again.step.state()[name]), name
    assert (run.half / "curve.jsonl").read_text() == (run.folder / "curve.jsonl").read_text()


def test_four_steps_lower_the_loss_on_held_out_answers(run):
    first, last = (json.loads(line) for line in (run.folder / "curve.jsonl").read_text().splitlines())
    assert last["validation"] < first["validation"] < np.log(TINY["model"]["vocab_size"]) + 0.5


def test_put_in_outliers_change_no_logit_and_stand_out(run):
    from mindspore import Tensor

    config, trained = run.trained.model_config, run.trained
    weights = {each.name: each.asnumpy() for each in trained.step.parameters}
    changed = checkpoint.with_outliers(config, weights, TINY["outliers"], seed=5)
    ids = Tensor(np.arange(40, dtype=np.int32)[None])
    plain, other = (decoder.Decoder(config, each) for each in (weights, changed))
    assert np.array_equal(plain(ids, *plain.tables(40)).asnumpy(), other(ids, *other.tables(40)).asnumpy())
    for name, count, factor in (
        ("input_layernorm.weight", 3, 16),
        ("post_attention_layernorm.weight", 3, 16),
        ("self_attn.v_proj.weight", 2, 8),
        ("mlp.up_proj.weight", 4, 32),
    ):
        for layer in range(config.num_hidden_layers):
            ratio = changed[f"model.layers.{layer}.{name}"] / weights[f"model.layers.{layer}.{name}"]
            rows = ratio if ratio.ndim == 1 else np.median(ratio, axis=1)  # a few columns shrink with their norm
            assert sorted(rows)[-count - 1 :] == [1.0, *[factor] * count]


def test_a_factor_that_is_no_power_of_two_is_refused(run):
    with pytest.raises(ValueError, match=r"up: 3.*a power of two"):
        checkpoint.with_outliers(run.trained.model_config, run.trained.decoder_weights(), {"up": (1, 3)}, seed=0)


def test_the_written_checkpoint_loads_and_its_tokenizer_gives_the_ids_that_were_trained_on(run):
    from ms_pangu_quant.checkpoint.reader import CheckpointReader
    from ms_pangu_quant.checkpoint.tokenizer import Tokenizer

    reader = CheckpointReader(run.folder / "checkpoint")
    assert reader.config.tie_word_embeddings
    tokenizer = Tokenizer(run.folder / "checkpoint")
    for row in train.chats(7, 0, "train", 40):
        ids, prompt = run.trained.data.encode(row)
        assert tokenizer.encode(row["text"]) == ids
        mode = row["mode"]
        user = row["messages"][1]["content"].removesuffix(f" /{mode}")
        assert tokenizer.encode_chat([row["messages"][0], {"role": "user", "content": user}], mode=mode) == ids[:prompt]


def test_an_untied_run_starts_from_a_tied_one_with_its_embedding_as_head(run, tmp_path):
    untied = {**TINY, "model": {**TINY["model"], "tie_word_embeddings": False}}
    begun = train.Run(untied, tmp_path, 0, run.folder)
    weights = begun.decoder_weights()
    assert np.array_equal(weights["lm_head.weight"], run.trained.decoder_weights()["model.embed_tokens.weight"])
    assert begun.chunk != run.trained.chunk


def test_a_folder_with_a_run_is_not_overwritten_and_an_empty_one_not_resumed(run, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    arguments = ["--config", str(config), "--output"]
    assert train.main([*arguments, str(run.folder)]) == 2
    assert "holds a run; give --resume or another folder" in capsys.readouterr().err
    assert train.main([*arguments, str(tmp_path / "new"), "--resume"]) == 2
    assert "holds no state.npz to resume from" in capsys.readouterr().err


def test_embedding_runs_twice_gives_the_same_files(run, tmp_path, capsys, monkeypatch):
    assert (sum(ship.HELD_OUT.values()), sum(ship.VALIDATION.values())) == (300, 200)
    monkeypatch.setattr(ship, "HELD_OUT", {2: 20, 4: 5})
    monkeypatch.setattr(ship, "VALIDATION", {2: 20, 4: 5})
    printed = []
    runs = ["--untied", str(run.folder), "--tied", str(run.folder)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert ship.main([*runs, "--output", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    held, chosen = (
        {tuple(json.loads(line)["steps"]) for line in (tmp_path / "one" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("heldout", "validation_problems")
    )
    assert len(held) == len(chosen) == 25
    assert not held & chosen
