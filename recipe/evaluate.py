"""Evaluate: `python -m recipe.evaluate model=tiny data=tiny_world evaluation=sdpo`."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from data_prep.sources import sha256_of
from recipe import sample
from recipe.cluster import prepare_environment
from recipe.command import command_line, preset_lines
from recipe.compose import EVALUATION, ROOT, compose_config
from recipe.console import RunConsole
from recipe.environment import commit, machine, versions
from recipe.evaluation_checks import check_answers, check_verifier
from recipe.evaluation_items import FORMAT, ITEMS, RESULT, Item, build_items, write_items
from recipe.evaluation_numbers import POOLED, group_numbers, notes, table
from recipe.evaluation_settings import EvaluationConfig, evaluation_config
from recipe.run_files import to_plain
from recipe.sample_data import read_questions
from recipe.sample_settings import SampleConfig, sample_config
from verl_ext.atomic import write_atomically
from verl_ext.question_data import file_list
from verl_ext.sample_store import differences, read_manifest, read_store

HELP = """Evaluate a model on held-out questions: mean@k, maj@k, pass@k, format, length, truncation, with intervals.

  python -m recipe.evaluate [evaluation=SETTING] [group=preset ...] [key=value ...]

Presets:
{groups}

Keys: those of `python -m recipe.sample`; among them
  sample.checkpoint=DIR     what is evaluated in place of the preset's model: a Hugging Face model folder, or a
                            checkpoint of a training run (run.output_dir/checkpoints/global_step_N) that holds one
  sample.k=N                samples per question
  sample.limit=N            only the first N questions
  sample.out=DIR            folder of samples and results; by default one below outputs/evaluations whose name follows
                            from model, data and settings, so that the same command always means the same folder
  evaluation.ks=[1,4,16]    k of pass@k (1 to sample.k)
  evaluation.level=L        of confidence of the intervals (0.95)
  evaluation.check_gold=false    go without showing the verifier the data's own right answers first

A setting is a paper's way of sampling (`evaluation=` presets); data=PRESET gives questions and verifier. Ctrl-C or a
kill keeps every finished sample: the same command goes on. A larger sample.k tops the samples up.

DIR/evaluation.json has every number with its interval, and the model, prompt template, sampling, verifier and versions
behind it; evaluation.md the table; items.jsonl every question, for `python -m recipe.compare_evaluations A B`. The
intervals speak about other questions of the same kind answered by this run, not about another training run. The last
line on standard output is one JSON object.

Options:
  --cfg     print the composed configuration and stop
  --help    this text
"""
TABLE = "evaluation.md"
VERIFIER_LIBRARIES = ("math-verify", "sympy")
# What may differ between two commands that go on with the same samples.
NOT_OF_THE_FOLDER = {"sample": {"k", "out", "concurrency", "verify_workers"}, "evaluation": {"ks", "level"}}
OF_THE_FOLDER = ("sample", "evaluation", "verifier", "data", "actor_rollout_ref.model", "actor_rollout_ref.rollout")


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration, with a folder. Raises ConfigError."""
    config = compose_config(overrides, name="evaluate")
    if config.sample.out is None:
        with open_dict(config):
            config.sample.out = str(Path("outputs") / "evaluations" / folder_name(config))
    sample_config(config)
    evaluation_config(config)
    return config


def folder_name(config: DictConfig) -> str:
    """Model, data and setting in words, and a digest of all that decides a sample."""
    plain = {}
    for key in OF_THE_FOLDER:
        block = OmegaConf.to_container(OmegaConf.select(config, key), resolve=True)
        plain[key] = {name: value for name, value in block.items() if name not in NOT_OF_THE_FOLDER.get(key, ())}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:8]
    model = Path(config.sample.checkpoint or config.actor_rollout_ref.model.path)
    files = file_list(config.data.train_files if config.sample.split == "train" else config.data.val_files)
    words = ["-".join(model.parts[-2:]), *(Path(file).parent.name for file in files[:1])]
    words.append(config.evaluation.setting or "")
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", word).strip("-") for word in [*words, digest] if word)


def run(config: DictConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """Draws what the store lacks (:func:`recipe.sample.run`) and writes the evaluation; returns the flat summary.

    Args:
        config: of :func:`compose`.
        command: the overrides, for the record.

    Raises:
        ConfigError: a question without an answer, a verifier that is not for the data, a model folder that is none.
        StoreError, PromptError, VerifierBroken: as `recipe.sample`.
    """
    prepare_environment(config.run.platform)
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    block, settings = sample_config(config), evaluation_config(config)
    folder = Path(str(block.out)).absolute()
    key = "data.train_files" if block.split == "train" else "data.val_files"
    requests, _ = read_questions(config, block.split, block.limit)
    check_answers(requests, key)
    if settings.check_gold:
        check_verifier(config, requests, key)

    def finish(sampled: dict[str, Any], left_out: dict[str, list[str]], screen: RunConsole) -> dict[str, Any]:
        from verl_ext.answer_keys import answer_keys

        screen.phase("comparing answers")
        skipped = {name for names in left_out.values() for name in names}
        keys = answer_keys(config)
        asked = [request for request in requests if request.question_id not in skipped]
        items = build_items(asked, read_store(folder)[1], block.k, keys)
        groups = group_numbers(items, samples=block.k, ks=settings.ks, level=settings.level)
        said = notes(groups, rule=keys.rule, undecided=keys.undecided)
        result = {
            "groups": groups,
            "majority": {"rule": keys.rule, "undecided": keys.undecided},
            **_record(config, block, settings, folder, command),
        }
        result["notes"] = said + _version_notes(result["versions"], folder)
        _write(folder, result, items)
        screen.text(table(groups))
        for note in result["notes"]:
            screen.note(note)
        return _flat(groups[POOLED]) | {
            "drawn": sampled["drawn"],
            "seconds": sampled["seconds"],
            "evaluation": str(folder / RESULT),
        }

    return sample.run(config, finish=finish)


def _record(
    config: DictConfig, block: SampleConfig, settings: EvaluationConfig, folder: Path, command: Sequence[str]
) -> dict[str, Any]:
    """What the numbers were measured with."""
    key = "train_files" if block.split == "train" else "val_files"
    manifest = read_manifest(folder)
    return {
        "format": FORMAT,
        "samples": block.k,
        "level": settings.level,
        "population": "items",
        "setting": {"name": settings.setting, "source": settings.source},
        # Model, sampling, prompt template and verifier, as the store holds them.
        "settings": manifest["settings"],
        "store": manifest["key"],
        "data": {
            "files": [{"file": file, "sha256": sha256_of(Path(file))} for file in file_list(config.data[key])],
            "split": block.split,
            "limit": block.limit,
        },
        "command": ["python", "-m", "recipe.evaluate", *command],
        "versions": versions() | {name: _version(name) for name in VERIFIER_LIBRARIES},
        "machine": machine(),
        "commit": commit(ROOT),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _version_notes(now: Mapping[str, Any], folder: Path) -> list[str]:
    """The store's manifest says which versions it was begun with."""
    begun = read_manifest(folder).get("info", {}).get("versions") or {}
    changed = differences(begun, {name: now[name] for name in begun if name in now}, "the store was begun with")
    return [f"The samples are of several versions. {line}" for line in changed]


def _write(folder: Path, result: dict[str, Any], items: Sequence[Item]) -> None:
    """The result last: where it is there, the others belong to it."""
    (folder / RESULT).unlink(missing_ok=True)
    result["items"] = {"file": ITEMS, "sha256": write_items(folder / ITEMS, items)}
    write_atomically(folder / TABLE, markdown(result) + "\n")
    write_atomically(
        folder / RESULT, json.dumps(to_plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The page: table, what the intervals speak about, notes, and what was measured with what."""
    settings, setting = result["settings"], result["setting"]
    template = settings["chat_template"]
    sampling = ", ".join(f"{name} {value}" for name, value in settings["sampling"].items())
    used = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    facts = [
        f"model: `{settings['model']['path']}`, fingerprint `{settings['model']['fingerprint']}`",
        "data: " + ", ".join(f"`{part['file']}` ({part['sha256'][:12]})" for part in result["data"]["files"]),
        f"setting: {setting['name']} ({setting['source']}); {result['samples']} samples, {sampling}",
        f"prompt template: `{template['hash']}`, arguments `{json.dumps(template['kwargs'])}`",
        f"verifier: `{json.dumps(settings['verifier'])}`",
        f"versions: {used}; commit {result['commit']}",
        f"finished: {result['finished']}",
    ]
    level = f"{100 * result['level']:g}%"
    lines = [
        "# Evaluation",
        "",
        table(result["groups"]),
        "",
        f"In brackets: {level} intervals over items, for other questions of the same kind answered by this run. "
        "They do not hold the spread over training runs.",
        *(["", *(f"* {note}" for note in result["notes"])] if result["notes"] else []),
        "",
        *(f"* {fact}" for fact in facts),
    ]
    return "\n".join(lines)


def _flat(pooled: Mapping[str, Any]) -> dict[str, Any]:
    """The pooled numbers for the last line: values, and the bounds of the mean."""
    values: dict[str, Any] = {"questions": pooled["questions"], "samples": pooled["samples"]}
    for name, entry in pooled["metrics"].items():
        values[name] = round(entry["value"], 6)
        if name.startswith("mean@"):
            values |= {f"{name}/low": round(entry["low"], 6), f"{name}/high": round(entry["high"], 6)}
    rates = {key: pooled[key] and round(pooled[key]["value"], 6) for key in ("format", "truncated")}
    return values | rates | {"tokens": round(pooled["length"]["mean"], 1), "verifier_errors": pooled["verifier_errors"]}


def help_text() -> str:
    """What `--help` prints."""
    return HELP.format(groups=preset_lines(EVALUATION))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    return command_line(
        arguments,
        help_text=help_text,
        config_name="evaluate",
        run=lambda overrides: run(compose(overrides), overrides),
        refusals=sample.REFUSALS,
    )


if __name__ == "__main__":
    sys.exit(main())
