"""What we rely on in TransferQueue, on a real one: columns survive, metas grow stale, wrong names are silent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict
from transfer_queue import KVBatchMeta

from verl_ext.packing import lengths, to_jagged

pytestmark = pytest.mark.e2e

KEYS = ["b_0_0", "a_1_0", "a_0_0"]


@pytest.fixture(scope="module")
def queue() -> Iterator[None]:
    """TransferQueue in the cluster that is there, or in one of its own."""
    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield
    tq.close()
    if ours:
        ray.shutdown()


@pytest.fixture
def stored(queue: None) -> Iterator[KVBatchMeta]:
    """Three rows with a jagged, a plain and a non-tensor column."""
    fields = TensorDict(
        {
            "responses": to_jagged([torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]),
            "weight": torch.tensor([0.5, 1.0, 1.5]),
            "uid": NonTensorData(["b", "a", "a"], batch_size=[3]),
        },
        batch_size=3,
    )
    tags = [{"status": "success", "row": i} for i in range(3)]
    yield tq.kv_batch_put(keys=KEYS, partition_id="train", fields=fields, tags=tags)
    tq.kv_clear(keys=KEYS, partition_id="train")


def test_jagged_plain_and_text_columns_come_back_in_the_order_of_the_keys(stored: KVBatchMeta) -> None:
    order = [KEYS[i] for i in (2, 0, 1)]
    data = tq.kv_batch_get(keys=order, partition_id="train", select_fields=["responses", "weight", "uid"])
    assert [row.tolist() for row in data["responses"].unbind()] == [[5, 6], [1, 2, 3], [4]]
    assert lengths(data["responses"]).tolist() == [2, 3, 1]
    assert data["weight"].flatten().tolist() == [1.5, 0.5, 1.0]
    assert [str(getattr(uid, "data", uid)) for uid in list(data["uid"])] == ["a", "b", "a"]


def test_a_field_that_does_not_exist_is_left_out_without_an_error(stored: KVBatchMeta) -> None:
    data = tq.kv_batch_get(keys=KEYS, partition_id="train", select_fields=["weight", "wieght"])
    assert "weight" in data.keys() and "wieght" not in data.keys()


def test_a_meta_lists_the_fields_of_its_time_and_drops_extra_info(stored: KVBatchMeta) -> None:
    stored.extra_info["temperature"] = 1.0
    later = tq.kv_batch_put(keys=KEYS, partition_id="train", fields=TensorDict({"later": torch.zeros(3)}, batch_size=3))
    assert "later" in later.fields and "later" not in stored.fields
    assert not later.extra_info
    assert set(stored.fields) >= {"responses", "weight", "uid"}


def test_tags_stay_with_their_rows(stored: KVBatchMeta) -> None:
    found = tq.kv_list(partition_id="train")["train"]
    assert {key: found[key]["row"] for key in KEYS} == {key: i for i, key in enumerate(KEYS)}
