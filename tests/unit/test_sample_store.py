"""The store of samples on disk, and the fingerprint of the model they came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_ext.config import ConfigError
from verl_ext.model_identity import checkpoint_weights, model_identity, weights_fingerprint
from verl_ext.sample_store import SampleStore, StoreError, read_store

SETTINGS = {"model": {"path": "m", "fingerprint": "f"}, "sampling": {"temperature": 1.0}}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append({"question_id": "q", "sample": 0, "prompt": "p"})
    other = {"model": {"path": "m", "fingerprint": "g"}, "sampling": {"temperature": 0.7, "top_p": 0.9}}
    with pytest.raises(StoreError) as refusal:
        SampleStore(tmp_path, other)
    message = str(refusal.value)
    assert "model.fingerprint: the store has 'f', asked for 'g'" in message
    assert "sampling.temperature: the store has 1.0, asked for 0.7" in message and "sampling.top_p" in message
    assert "model.path" not in message
    assert len(read_store(tmp_path)[1]) == 1


def test_a_store_without_samples_takes_new_settings(tmp_path: Path) -> None:
    SampleStore(tmp_path, SETTINGS).close()
    other = {"model": {"path": "n"}}
    with SampleStore(tmp_path, other) as store:
        store.append({"question_id": "q", "sample": 0, "prompt": "p"})
    assert read_store(tmp_path) == (other, [{"question_id": "q", "sample": 0, "prompt": "p"}])


def test_a_torn_last_line_is_drawn_again_and_a_whole_one_kept(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        for sample in range(3):
            store.append({"question_id": "q", "sample": sample, "prompt": "p", "text": "x" * 100_000})
        path = store.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    assert len(read_store(tmp_path)[1]) == 2
    with SampleStore(tmp_path, SETTINGS) as store:
        assert len(store) == 2
        store.append({"question_id": "q", "sample": 2, "prompt": "p"})
    assert [row["sample"] for row in read_store(tmp_path)[1]] == [0, 1, 2]
    path.write_bytes(whole[:-1])  # only the end of the line is missing
    with SampleStore(tmp_path, SETTINGS) as store:
        assert len(store) == 3
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append({"question_id": "q", "sample": 0, "prompt": "p"})
        path = store.path
    path.write_bytes(b"{broken\n" + path.read_bytes())
    with pytest.raises(StoreError, match=r"samples-.*\.jsonl, line 1: not a sample"):
        SampleStore(tmp_path, SETTINGS)


def test_one_writer_at_a_time_and_no_sample_twice(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append({"question_id": "q", "sample": 0, "prompt": "p"})
        with pytest.raises(StoreError, match="sample 0 of question q is there already"):
            store.append({"question_id": "q", "sample": 0, "prompt": "p"})
        with pytest.raises(StoreError, match="another process is writing"):
            SampleStore(tmp_path, SETTINGS)
    SampleStore(tmp_path, SETTINGS).close()


def test_samples_without_their_manifest_are_refused(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append({"question_id": "q", "sample": 0, "prompt": "p"})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="has no manifest.json beside it"):
        SampleStore(tmp_path, SETTINGS)


def test_half_a_surrogate_pair_comes_back_as_it_was(tmp_path: Path) -> None:
    row = {"question_id": "q", "sample": 0, "prompt": "p", "text": "a\ud83dü\nb"}
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append(row)
    assert read_store(tmp_path)[1] == [row]


# --- which model -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_contents_and_not_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(weights: bytes) -> Path:
        (tmp_path / "config.json").write_text('{"hidden_size": 8}')
        (tmp_path / "model.safetensors").write_bytes(weights)
        return tmp_path

    first = weights_fingerprint(model(b"\0" * 4000))
    assert weights_fingerprint(model(b"\0" * 4000)) == first
    assert weights_fingerprint(model(b"\0" * 3999 + b"\1")) != first
    # Large files are read in blocks: a checkpoint of the same run differs nearly everywhere.
    monkeypatch.setattr("verl_ext.model_identity.WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr("verl_ext.model_identity.BLOCK_BYTES", 100)
    monkeypatch.setattr("verl_ext.model_identity.BLOCKS", 5)
    first = weights_fingerprint(model(bytes(range(250)) * 16))
    assert weights_fingerprint(model(bytes(range(1, 251)) * 16)) != first


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no config.json"):
        weights_fingerprint(tmp_path)
    with pytest.raises(ConfigError, match="no folder and no name on the hub"):
        model_identity("/does/not/exist")


def test_the_model_folder_of_a_checkpoint_is_found_or_explained(tmp_path: Path) -> None:
    actor = tmp_path / "actor"
    actor.mkdir()
    with pytest.raises(ConfigError, match="holds no model"):
        checkpoint_weights(str(tmp_path))
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="actor holds the trainer's shards only.*recipe.export RUN_DIR"):
        checkpoint_weights(str(tmp_path))
    merged = actor / "huggingface"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (merged / "model.safetensors").write_bytes(b"x")
    assert checkpoint_weights(str(tmp_path)) == merged == checkpoint_weights(str(actor))
