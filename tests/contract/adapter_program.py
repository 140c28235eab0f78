"""One rank of the runs that test_adapter_ranks.py compares: LoRA through the real engines, without Ray.

``python adapter_program.py WORLDS`` forks the ranks (forked_ranks.py); rank 0 of each world writes the world's file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from recipe.cluster import prepare_environment

prepare_environment("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from forked_ranks import become_a_rank  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402

from recipe.compose import compose_config  # noqa: E402
from verl_ext.row_store import STORE  # noqa: E402
from verl_ext.standalone import StandaloneWorker, make_batch  # noqa: E402

ROWS, TOKENS = 4, 6
LORA = [
    "method=sdpo",
    "teacher=frozen",
    "adapter=lora",
    "actor_rollout_ref.model.lora_rank=8",
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "actor_rollout_ref.actor.use_kl_loss=true",
]
INPUTS = {"logits": [], "hidden_states": ["divergence=jsd_full"]}


def batch() -> Any:
    """This rank's rows of the same four."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 128, (3, TOKENS), generator=generator).tolist() for _ in range(ROWS)]
    mine = list(range(dist.get_rank(), ROWS, dist.get_world_size()))
    parts = [[rows[i][part] for i in mine] for part in range(3)]
    return make_batch(*parts, [1.0] * len(mine), row_ids=mine, rows=ROWS, tokens=ROWS * TOKENS)


def weights(worker: StandaloneWorker) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in worker.actor.engine.module.named_parameters():
        value = parameter.detach()
        found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def run(config: DictConfig) -> dict[str, Any]:
    worker = StandaloneWorker(config)
    worker.init_model()
    data = batch()

    def call(method: Any, **settings: Any) -> Any:
        copy = data.clone(recurse=False)
        tu.assign_non_tensor(copy, temperature=1.0, **settings)
        return method(copy)

    def log_probs(**settings: Any) -> torch.Tensor:
        output = call(worker.compute_log_prob, calculate_entropy=False, compute_loss=False, **settings)
        return torch.cat(list(output["log_probs"].unbind()))

    logits = worker.distill.student_inputs == "logits"
    start, result = weights(worker), {"described": worker.describe()["teacher"], "losses": [], "norms": []}
    reference = log_probs(no_lora_adapter=True)
    for _ in range(2):
        call(worker.compute_teacher)
        kept = len(STORE.rows())
        again = log_probs(no_lora_adapter=True)
        result["reference_moved"] = float((again - reference).abs().max())
        result["store"] = [kept, len(STORE.rows())]
        output = call(
            worker.update_actor,
            rollout_threshold=None,
            calculate_entropy=False,
            distillation_use_topk=logits,
            distillation_only=True,
            global_batch_size=ROWS,
        )
        metrics = tu.get(output, "metrics")
        result["losses"].append(sum(metrics["distill/loss"]) if isinstance(metrics["distill/loss"], list)
                                else float(metrics["distill/loss"]))  # fmt: skip
        result["norms"].append(float(torch.tensor(metrics["grad_norm"]).flatten()[0]))
    result["adapter_moved"] = float((log_probs() - log_probs(no_lora_adapter=True)).abs().max())
    result["changed"] = changed(start, weights(worker))
    result["adapter"] = [name for name in start if "lora_" in name]
    result["discrepancy"] = float(call(worker.compute_discrepancy)["mean"][0])
    return result


def main() -> None:
    configs = {name: compose_config([*LORA, *overrides]) for name, overrides in INPUTS.items()}
    out = Path(become_a_rank(Path(sys.argv[1])))
    torch.set_num_threads(1)
    results = {name: run(config) for name, config in configs.items()}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
