"""A model folder from a run's checkpoint: `python -m recipe.export RUN_DIR --output DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipe.checkpoints import newest_complete, the_complete
from verl_ext.checkpoint_manifest import CheckpointError, Manifest
from verl_ext.checkpoint_saving import step_folder
from verl_ext.config import ConfigError

if TYPE_CHECKING:
    import torch

    from verl_ext.whole_weights import Weights

DESCRIPTION = """Write the student or the teacher of a checkpoint as a Hugging Face folder: weights, config, tokenizer,
chat template, generation config. No GPU, Ray or process group is needed."""
EPILOG = """The folder is what transformers loads and vLLM serves:
  vllm serve DIR
and what recipe.sample, recipe.srt and actor_rollout_ref.model.path take. A student with LoRA is merged into its base
weights; --adapter writes the adapter alone, for peft and for vLLM's --lora-modules.

Every file of the checkpoint is read and compared with its checksum first. Exit codes: 0; 2 where it was refused."""
DTYPES = ("as_trained", "float32", "bfloat16", "float16")
FILE_BYTES = 5_000_000_000
"""Of one file of weights."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m recipe.export",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("run", type=Path, metavar="RUN_DIR", help="run.output_dir of the run")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="the model folder; must not exist")
    made.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (the newest complete one)")
    made.add_argument("--teacher", action="store_true", help="the teacher that follows the student, in its fp32")
    made.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, not merged")
    made.add_argument("--dtype", choices=DTYPES, default="as_trained", help="of the weights (as_trained: bit for bit)")
    made.add_argument(
        "--unpickle", action="store_true", help="load shards that hold more than tensors: runs their code"
    )
    return made


def export(
    run: Path,
    output: Path,
    *,
    step: int | None = None,
    teacher: bool = False,
    adapter: bool = False,
    dtype: str = "as_trained",
    unpickle: bool = False,
) -> dict[str, Any]:
    """Writes the model folder; returns what ``export.json`` in it says.

    Raises:
        ConfigError: the run has no such checkpoint or teacher, the checkpoint is not whole, ``output`` exists.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists; choose another folder or remove it")
    config = _run_config(run)
    checkpoints = run / "checkpoints"
    manifest = _manifest(checkpoints, step)
    folder = step_folder(checkpoints, manifest.step)
    print(
        f"step {manifest.step}: {len(manifest.files)} files, {manifest.bytes / 1e9:.3g} GB, all as saved",
        file=sys.stderr,
    )
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        about = {"run": run.resolve().name, "step": manifest.step, "of": "teacher" if teacher else "student"}
        if adapter:
            about |= _write_adapter(folder, manifest, config, partial, teacher, unpickle)
        else:
            about |= _write_model(folder, manifest, config, partial, teacher, dtype, unpickle)
        (partial / "export.json").write_text(json.dumps(about, indent=2) + "\n")
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return about


def _run_config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} holds no config.yaml: not the folder of a run")
    return yaml.safe_load(path.read_text())


def _manifest(checkpoints: Path, step: int | None) -> Manifest:
    if step is not None:
        return the_complete(checkpoints, step)
    manifest = newest_complete(checkpoints, note=lambda text: print(f"warning: {text}", file=sys.stderr))
    if manifest is None:
        raise ConfigError(f"{checkpoints} holds no checkpoint (run.save_every was -1?)")
    return manifest


def _write_model(
    folder: Path, manifest: Manifest, config: dict[str, Any], out: Path, teacher: bool, dtype: str, unpickle: bool
) -> dict[str, Any]:
    import torch

    from verl_ext.whole_weights import MergedAdapter, StudentWeights, TeacherWeights, lora_meta, select, skeleton

    _copy_settings(folder / "actor" / "huggingface", out)
    model = skeleton(out)
    meta = None
    weights: Weights
    if teacher:
        _check_teacher(manifest, config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        weights = TeacherWeights(folder / "teacher", manifest.world_size, shapes)
    else:
        weights = StudentWeights(folder / "actor", manifest.world_size, unpickle=unpickle)
        meta = lora_meta(folder / "actor")
        if meta is not None:
            _check_plain_lora(config)
            weights = MergedAdapter(weights, meta)
    chosen = select(weights, model)
    target = None if dtype == "as_trained" else getattr(torch, dtype)
    written = _write_weights(weights, chosen, target, out)
    _set_dtype(out / "config.json", written)
    about = {"dtype": written, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    return about | ({"adapter": "merged"} if meta is not None else {})


def _check_teacher(manifest: Manifest, config: dict[str, Any]) -> None:
    if any(name.startswith("teacher/") for name in manifest.files):
        return
    teacher, model = config["distill"]["teacher"], config["actor_rollout_ref"]["model"]["path"]
    where = {
        "frozen": f"it is the starting model, {model}",
        "live": "it is the student; leave --teacher out",
        "external": f"it is the model {teacher['path']}",
        "trust_region": f"it is a mixture of the starting model, {model}, and the student",
    }
    said = where.get(teacher["kind"], "the run has none")
    raise ConfigError(f"--teacher: the checkpoint holds none, distill.teacher.kind was {teacher['kind']}: {said}")


def _check_plain_lora(config: dict[str, Any]) -> None:
    """An adapter the run started from may scale otherwise than alpha / r."""
    path = config["actor_rollout_ref"]["model"].get("lora_adapter_path")
    if path is None:
        return
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise ConfigError(f"the run started from the adapter {path}, and {file} says how it is scaled: it is gone")
    settings = json.loads(file.read_text())
    for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
        if settings.get(key):
            raise ConfigError(f"{file} has {key}={settings[key]!r}; allowed: none, because alpha / r is merged")


def _copy_settings(source: Path, out: Path) -> None:
    """Config, tokenizer, chat template, generation config; code of the model's own too."""
    weights = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(weights):
            shutil.copyfile(path, out / path.name)
    if not (out / "config.json").is_file():
        raise CheckpointError(f"{source / 'config.json'} is missing")


def _set_dtype(path: Path, dtype: str) -> None:
    settings = json.loads(path.read_text())
    # verl's override of the attention is for its own engine.
    settings.pop("attn_implementation", None)
    path.write_text(json.dumps(settings | {"dtype": dtype}, indent=2) + "\n")


def _write_weights(weights: Weights, chosen: dict[str, str], dtype: torch.dtype | None, out: Path) -> str:
    """Writes safetensors of at most FILE_BYTES each, with an index where there are several; returns the dtype."""
    from safetensors.torch import save_file

    from verl_ext.whole_weights import whole

    found, total, where = None, 0, {}
    files: list[Path] = []
    for part in _parts(whole(weights, chosen, dtype)):
        files.append(out / f"model-{len(files) + 1:05d}.safetensors")
        save_file(part, files[-1], metadata={"format": "pt"})
        # safetensors lets nobody else read what it writes.
        shutil.copymode(out / "config.json", files[-1])
        found = found or next(tensor.dtype for tensor in part.values() if tensor.is_floating_point())
        total += sum(tensor.nbytes for tensor in part.values())
        where |= dict.fromkeys(part, len(files))
        print(f"{len(where)} of {len(chosen)} tensors, {total / 1e9:.3g} GB", file=sys.stderr)
    if len(files) == 1:
        files[0].rename(out / "model.safetensors")
    else:
        names = [f"{file.stem}-of-{len(files):05d}.safetensors" for file in files]
        for file, name in zip(files, names, strict=True):
            file.rename(out / name)
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[i - 1] for name, i in where.items()}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return str(found).removeprefix("torch.")


def _parts(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > FILE_BYTES:
            yield part
            part = {}
        part[name] = tensor
    yield part


def _write_adapter(
    folder: Path, manifest: Manifest, config: dict[str, Any], out: Path, teacher: bool, unpickle: bool
) -> dict[str, Any]:
    """The adapter in peft's format; its own config says which modules it is for."""
    from safetensors.torch import save_file

    from verl_ext.whole_weights import PEFT_PREFIX, A, B, MergedAdapter, StudentWeights, lora_meta

    meta = lora_meta(folder / "actor")
    if meta is None or teacher:
        raise ConfigError("--adapter: " + ("the teacher has none" if teacher else "the student has none (no LoRA)"))
    _check_plain_lora(config)
    weights = StudentWeights(folder / "actor", manifest.world_size, unpickle=unpickle)
    adapter = MergedAdapter(weights, meta).adapter
    tensors = {
        PEFT_PREFIX + plain.replace(".default.weight", ".weight"): weights[name].contiguous()
        for plain, name in adapter.items()
    }
    (out / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": meta["task_type"],
                "r": meta["r"],
                "lora_alpha": meta["lora_alpha"],
                "target_modules": sorted(
                    {plain.removesuffix(A).removesuffix(B).rsplit(".", 1)[-1] for plain in adapter}
                ),
                "base_model_name_or_path": config["actor_rollout_ref"]["model"]["path"],
                "bias": "none",
            },
            indent=2,
        )
        + "\n"
    )
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copymode(out / "adapter_config.json", out / "adapter_model.safetensors")
    return {"adapter": "alone", "parameters": sum(tensor.numel() for tensor in tensors.values())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        about = export(
            options.run,
            options.output,
            step=options.step,
            teacher=options.teacher,
            adapter=options.adapter,
            dtype=options.dtype,
            unpickle=options.unpickle,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(about | {"output": str(options.output)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
