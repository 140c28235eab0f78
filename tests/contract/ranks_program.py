"""One rank of the runs that test_ranks.py compares: real engines, many cases in one process.

``python ranks_program.py WORLDS`` forks the ranks (forked_ranks.py). Each reads the plan of its world, a JSON file;
rank 0 writes one file per case beside it. Nothing is caught: a case that fails ends the process, and the parent the
others.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from recipe.cluster import prepare_environment

prepare_environment("cpu")

import omegaconf.base  # noqa: E402
import omegaconf.grammar_parser  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from forked_ranks import become_a_rank  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402

from recipe.compose import check, compose_config  # noqa: E402
from verl_ext.config import distill_config  # noqa: E402
from verl_ext.gradient_sketch import GradientSketch  # noqa: E402
from verl_ext.loss import Loss  # noqa: E402
from verl_ext.packing import to_jagged  # noqa: E402
from verl_ext.row_store import STORE  # noqa: E402
from verl_ext.standalone import StandaloneWorker, make_batch  # noqa: E402

# The same ``${...}`` stand in the configuration of every case; parsing them takes longer than looking their values up.
omegaconf.base.parse = cache(omegaconf.grammar_parser.parse)

PADDING_ROW = {"prompt": [2], "response": [2], "teacher_prompt": [2], "weight": 0.0, "mask": [0]}


def full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: full(parameter) for name, parameter in engine.module.named_parameters()}


def composed(overrides: list[str]) -> DictConfig:
    """``compose_config``, once for each method: Hydra takes longer than a case. Values are put in and checked after."""
    method, values = overrides[0], overrides[1:]
    config = OmegaConf.merge(_of_method(method), OmegaConf.from_dotlist(values))
    check(config)
    return config


@cache
def _of_method(method: str) -> DictConfig:
    return compose_config([method])


class Rank:
    """A worker, and what it was built with; the next case with the same settings starts from the same weights."""

    def __init__(self, overrides: list[str]) -> None:
        self.worker = StandaloneWorker(composed(overrides))
        self.worker.init_model()
        self.distill = self.worker.config.distill
        self.engines = [worker.engine for worker in (self.worker.actor, self.worker.ref) if worker is not None]
        self.start = [[p.detach().clone() for p in engine.module.parameters()] for engine in self.engines]
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.sketches: list[torch.Tensor] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.dump = False
        self._watch(self.worker.actor.engine)

    def _watch(self, actor: Any) -> None:
        step = actor.optimizer_step

        def watched() -> float:
            self.gradients.append({name: full(p.grad) for name, p in actor.module.named_parameters()})
            self.sketches.append(GradientSketch(64, seed=3).take(actor.module, dist.group.WORLD).cpu())
            norm = step()
            if self.dump:
                self.weights.append(full_weights(actor))
            return norm

        actor.optimizer_step = watched

    @torch.no_grad()
    def begin(self, distill: list[str], dump: bool) -> None:
        """Starting weights, a fresh optimiser, and the case's `distill` block (built as ``init_model`` does)."""
        for engine, start in zip(self.engines, self.start, strict=True):
            for parameter, value in zip(engine.module.parameters(), start, strict=True):
                parameter.copy_(value)
        optimizer = self.worker.actor.engine.optimizer
        optimizer.zero_grad()
        optimizer.state.clear()
        STORE.clear()
        self.gradients, self.sketches, self.weights, self.dump = [], [], [], dump
        block = OmegaConf.merge(self.distill, OmegaConf.from_dotlist(distill))
        self.worker.distill = distill_config(block)
        self.worker.actor.set_loss_fn(Loss(self.worker.distill, self.worker.actor.loss_fn.actor_config))


def batch_of(case: dict[str, Any], rows: list[dict[str, Any]], rank: int) -> Any:
    ids = case["deal"][rank]
    mine = [rows[i] if i >= 0 else PADDING_ROW for i in ids]
    batch = make_batch(
        [row["prompt"] for row in mine],
        [row["response"] for row in mine],
        [row["teacher_prompt"] for row in mine],
        [row["weight"] for row in mine],
        row_ids=[max(i, -1) for i in ids],
        mini_batches=[case["mini_batches"][i] for i in ids] if case["mini_batches"] else None,
        rows=case["row_count"],
        tokens=case["token_count"],
        **{name: [row.get(name, [0.0]) for row in mine] for name in case["columns"]},
    )
    batch["response_mask"] = to_jagged([torch.tensor(row["mask"]) for row in mine])
    return batch


def run_case(rank: Rank, case: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    worker = rank.worker
    rank.begin(case["distill"], case["dump"])
    batch = batch_of(case, rows, dist.get_rank())
    common = {"temperature": case["temperature"]}

    def call(method: Any, **settings: Any) -> Any:
        data = batch.clone(recurse=False)
        tu.assign_non_tensor(data, **common, **settings)
        return method(data)

    result: dict[str, Any] = {"steps": [], "name": case["name"]}
    for _ in range(case["steps"]):
        if case["discrepancy"]:
            output = call(worker.compute_discrepancy)
            worst = [torch.stack([output["mean"][0], output["largest"][0]]) for _ in range(dist.get_world_size())]
            dist.all_gather(worst, worst[dist.get_rank()].clone())
            result["discrepancy"] = torch.stack(worst)
        if worker.distill.student_pass:
            call(worker.compute_log_prob, calculate_entropy=False, distillation_only=True)
        taught = call(worker.compute_teacher)
        kept = [
            (row.teacher_hidden is not None, row.support_ids is not None, row.teacher_log_probs is not None)
            for row in STORE.rows()
        ]
        ratios: list[Any] = [None] * dist.get_world_size()
        if "teacher_log_ratio" in taught:
            mine = {
                i: row.tolist()
                for i, row in zip(case["deal"][dist.get_rank()], taught["teacher_log_ratio"].unbind(), strict=True)
            }
            dist.all_gather_object(ratios, mine)
        first = len(rank.gradients)
        # As verl_ext.trainer._update_settings.
        output = call(
            worker.update_actor,
            **{
                "rollout_threshold": None,
                "calculate_entropy": False,
                "distillation_use_topk": worker.distill.divergence_loss and worker.distill.student_inputs == "logits",
                "distillation_only": worker.distill.divergence_loss and not worker.distill.policy_gradient,
                "global_batch_size": case["row_count"],
                **case["settings"],
            },
        )
        step = {
            "metrics": dict(tu.get(output, "metrics")),
            "gradients": rank.gradients[first:],
            "sketches": rank.sketches[first:],
            "weights": rank.weights[first:],
            "updated": worker.actor.updated,
            "kept": kept,
            "store_rows": len(STORE.rows()),
            "store_head": STORE.teacher_head is not None,
            "ratios": ratios,
        }
        if case["teacher_rate"] is not None:
            moved = worker.update_teacher(case["teacher_rate"])
            distance = torch.tensor(moved["squared_distance"], dtype=torch.float64)
            dist.all_reduce(distance)
            step["moved"], step["squared_distance"] = moved["moved"], float(distance)
        if case["dump"] and worker.ref is not None:
            step["teacher"] = full_weights(worker.ref.engine)
        result["steps"].append(step)
    return result


def main() -> None:
    # verl collects garbage in every build; what the imports made need not be looked through each time.
    _of_method("method=sdpo")
    gc.collect()
    gc.freeze()
    plan_file = Path(become_a_rank(Path(sys.argv[1])))
    plan = json.loads(plan_file.read_text())
    faulthandler.dump_traceback_later(plan["timeout"], exit=True)
    torch.set_num_threads(1)
    rank, built, started = None, None, time.monotonic()
    for number, case in enumerate(plan["cases"]):
        print(f"case {case['name']} ({time.monotonic() - started:.1f} s, CPU {time.process_time():.1f} s)", flush=True)
        if case["overrides"] != built:
            rank, built = Rank(case["overrides"]), case["overrides"]
        result = run_case(rank, case, plan["rows"][case["rows"]])
        if dist.get_rank() == 0:
            torch.save(result, plan_file.parent / f"{plan_file.stem}_{number}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
