"""The doctor inside a real cluster: a worker tells what it runs, and the real weights give no divergence."""

from __future__ import annotations

import json

import pytest

from recipe.doctor import main

pytestmark = pytest.mark.e2e


def test_all_is_well_for_the_tiny_world(cluster, data, tmp_path, capsys):
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"]
    status = main(["--json", *files, f"run.output_dir={tmp_path / 'run'}", "run.save_every=5"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert status == 0 and found["status"] in ("ok", "warn"), by_name
    assert by_name["workers"]["line"] == "plugin and DistillEngine on 1 of 1 nodes"
    for name in ("prompts alike", "teacher equals student", "nodes alike", "Ray resources", "memory"):
        assert by_name[name]["status"] == "ok", by_name[name]
    assert not (tmp_path / "run").exists()
