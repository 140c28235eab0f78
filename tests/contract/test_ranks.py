"""Loss, gradient and teacher on real engines: against float64 by the textbook, and the same on any layout of the rows.

FSDP2 over gloo and Hugging Face models, without Ray: 1, 2 and 4 processes of ``ranks_program.py`` run all cases once,
the tests compare what they wrote.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipe.compose import ROOT
from verl_ext.gradient_sketch import GradientSketch

pytestmark = pytest.mark.contract

PROGRAM = Path(__file__).with_name("ranks_program.py")
# Not in a package: pytest imports test modules one by one.
_spec = importlib.util.spec_from_file_location("forked_ranks", PROGRAM.with_name("forked_ranks.py"))
forked_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(forked_ranks)
TIMEOUT = 400
# More than there are: rows and tokens that were left out count in the denominators.
ROW_COUNT, TOKEN_COUNT = 11, 97
BROKEN_LENGTH = 11
"""Response length of the one row for which the kinds of ``KINDS`` break."""

KINDS = f'''
"""Kinds that break where a micro-batch has {BROKEN_LENGTH} response tokens."""
import torch

def value(log_s, log_t, alpha):
    entries = log_t.exp() * (log_t - log_s)
    return entries * float("nan") if len(log_s) == {BROKEN_LENGTH} else entries

def slope(log_s, log_t, alpha):
    entries = log_t.exp() * (log_t - log_s)
    return entries + 0 * torch.sqrt(log_s - log_s.detach()) if len(log_s) == {BROKEN_LENGTH} else entries
'''

# ------------------------------------------------------------------------------------------------------------- the rows

WEIGHTS = [1.0, 0.0, 0.5, 2.0, 0.0, 1.5, 1.0, 0.25]
SIZES = [(4, 7, 12), (9, 3, 1), (3, 12, 19), (6, 2, 5), (8, 10, 1), (5, BROKEN_LENGTH, 9), (7, 5, 17), (3, 9, 14)]
ALL = list(range(8))


def make_rows() -> list[dict[str, Any]]:
    """Prompt, response and teacher prompt of every row; two rows are not distilled, one has tokens outside the mask."""
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 128) for _ in range(count)]

    rows = []
    for weight, (prompt, response, teacher_prompt) in zip(WEIGHTS, SIZES, strict=True):
        rows.append(
            {
                "prompt": tokens(prompt),
                "response": tokens(response),
                "teacher_prompt": tokens(teacher_prompt),
                "weight": weight,
                "mask": [1] * response,
                "advantages": [rng.uniform(-1.5, 1.5)] * response,
                "rollout_is_weights": [rng.uniform(0.3, 1.4) for _ in range(response)],
                "noise": [rng.gauss(0.0, 0.4) for _ in range(2 * response)],
            }
        )
    rows[2]["mask"][4:7] = [0, 0, 0]
    return rows


# ---------------------------------------------------------------------------------------------------------- the layouts


@dataclass(frozen=True)
class Layout:
    """How rows are dealt to ranks and packed into micro-batches; -1 is a padding row."""

    deal: list[list[int]]
    overrides: list[str]

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.deal)


def dynamic(tokens: int, teacher_tokens: int) -> list[str]:
    return [
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
        f"actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu={tokens}",
        f"actor_rollout_ref.ref.log_prob_max_token_len_per_gpu={teacher_tokens}",
    ]


def fixed(rows: int) -> list[str]:
    return [
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=false",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={rows}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={rows}",
    ]


PACKED = ["actor_rollout_ref.model.use_remove_padding=true"]
SMALL = dynamic(24, 32)
EVEN_2 = [[0, 2, 4, 6], [1, 3, 5, 7]]
# All distilled rows on the first rank.
UNEVEN_2 = [[7, 6, 5, 3, 2, 0], [4, 1]]
PADDED_2 = [[7, 6, 5, 3, 2, 0, -1, -1], [-1, 4, 1, -1, -1, -1, -1, -1]]
EVEN_4 = [[0, 4], [1, 5], [2, 6], [3, 7]]
UNEVEN_4 = [[2, 0, 3], [4], [5, 6, 7], [1]]
PADDED_4 = [[2, 0, 3, 7], [4, 1, -1, -1], [5, 6, -1, -1], [-1, -1, -1, -1]]

LAYOUTS = {
    "plain": Layout([ALL], []),
    "small": Layout([ALL], SMALL),
    "packed": Layout([ALL], PACKED),
    "packed_small": Layout([ALL], PACKED + SMALL),
    "one": Layout([ALL], fixed(1)),
    "packed_four": Layout([ALL], PACKED + fixed(4)),
    "2_even_small": Layout(EVEN_2, SMALL),
    "2_uneven": Layout(UNEVEN_2, []),
    "2_padded_one": Layout(PADDED_2, fixed(1)),
    "2_packed_padded_four": Layout(PADDED_2, PACKED + fixed(4)),
    "2_packed_even_small": Layout(EVEN_2, PACKED + SMALL),
    "4_even": Layout(EVEN_4, []),
    "4_packed_uneven": Layout(UNEVEN_4, PACKED),
    "4_padded_small": Layout(PADDED_4, SMALL),
    "4_packed_padded_four": Layout(PADDED_4, PACKED + fixed(4)),
}
EVEN = {1: "plain", 2: "2_even_small", 4: "4_even"}

# ------------------------------------------------------------------------------------------------------------ the cases

TOPK = 20
MEASURES: dict[str, tuple[list[str], float]] = {
    "jsd_student": ([], 1.0),
    "jsd_student_kept": (["teacher.states=log_probs"], 1.0),
    "jsd_student_hidden": (
        ["divergence.inputs=hidden_states", "divergence.tail=false", "divergence.aggregation=token-mean"],
        0.7,
    ),
    "reverse_student_kept_hidden": (
        ["divergence.kind=reverse_kl", "teacher.states=log_probs", "divergence.inputs=hidden_states"],
        0.7,
    ),
    "forward_teacher": (["divergence.kind=forward_kl", "divergence.support=teacher_topk"], 0.7),
    "forward_teacher_hidden": (
        [
            "divergence.kind=forward_kl",
            "divergence.support=teacher_topk",
            "divergence.inputs=hidden_states",
            "teacher.states=hidden_states",
            "divergence.clip=0.7",
            "divergence.clip_level=token",
        ],
        1.0,
    ),
    "jsd_full": (["divergence.support=full", "divergence.tail=false", "divergence.alpha=0.3"], 1.0),
    "reverse_full": (
        [
            "divergence.kind=reverse_kl",
            "divergence.support=full",
            "divergence.tail=false",
            "divergence.aggregation=token-mean",
        ],
        1.0,
    ),
    "akl_full": (["divergence.kind=akl", "divergence.support=full", "divergence.tail=false"], 0.7),
    "mixed_full_clip": (
        ["divergence.kind=mixed", "divergence.support=full", "divergence.tail=false", "divergence.clip=0.05"],
        1.0,
    ),
    "sampled": (["divergence.kind=sampled_token"], 0.7),
    "sampled_hidden": (["divergence.kind=sampled_token", "divergence.inputs=hidden_states"], 1.0),
}
ON_LAYOUTS = [
    "jsd_student",
    "jsd_student_kept",
    "jsd_student_hidden",
    "forward_teacher",
    "jsd_full",
    "mixed_full_clip",
    "sampled",
    "sampled_hidden",
]
TEACHERS: dict[str, tuple[list[str], float | None]] = {
    "ema": (["distill.teacher.kind=ema", "distill.teacher.update_rate=0.3"], 0.3),
    "frozen": (["distill.teacher.kind=frozen"], 0.0),
    "live": (["distill.teacher.kind=live"], None),
    "synced": (["distill.teacher.kind=synced"], 1.0),
    "trust_region": (["distill.teacher.kind=trust_region", "distill.teacher.update_rate=0.05"], 0.0),
    "external": (["distill.teacher.kind=external", "distill.teacher.path=MODEL_external"], None),
}


@dataclass
class Case:
    """What one update, or a few in a row, are made of. ``like``: the case whose numbers it must have."""

    name: str
    model: str = "tied"
    layout: str = "plain"
    method: str = "sdpo"
    teacher: str = "frozen"
    build: list[str] = field(default_factory=list)
    distill: list[str] = field(default_factory=list)
    temperature: float = 1.0
    deal: list[list[int]] | None = None
    columns: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    mini_batches: list[int] | None = None
    steps: int = 1
    dump: bool = False
    discrepancy: bool = False
    row_count: int = ROW_COUNT
    token_count: int = TOKEN_COUNT
    like: str | None = None

    @property
    def world(self) -> int:
        """Ranks."""
        return LAYOUTS[self.layout].world

    def overrides(self, models: dict[str, Path]) -> list[str]:
        """What the worker is built from."""
        overrides = [
            f"method={self.method}",
            f"actor_rollout_ref.model.path={models[self.model]}",
            f"distill.divergence.topk={TOPK}",
            # Gradient descent: what rounding changes in a gradient stays as small in the weights.
            "actor_rollout_ref.actor.optim.optimizer=SGD",
            "actor_rollout_ref.actor.optim.lr=0.1",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
            *TEACHERS[self.teacher][0],
            *self.build,
            *LAYOUTS[self.layout].overrides,
        ]
        return [text.replace("MODEL_external", str(models["external"])) for text in overrides]

    def plan(self, models: dict[str, Path]) -> dict[str, Any]:
        """For the program."""
        plan = asdict(self)
        plan["overrides"] = self.overrides(models)
        plan["deal"] = self.deal or LAYOUTS[self.layout].deal
        plan["teacher_rate"] = TEACHERS[self.teacher][1]
        plan["rows"] = self.model
        return plan


def measured() -> list[Case]:
    cases = []
    for model in ("tied", "untied"):
        for name, (distill, temperature) in MEASURES.items():
            cases.append(Case(f"{model} {name}", model, distill=distill, temperature=temperature))
    return cases


def laid_out() -> list[Case]:
    cases = []
    for number, layout in enumerate(key for key in LAYOUTS if key != "plain"):
        one_rank = LAYOUTS[layout].world == 1
        # Both models on one rank; on several, each in some of the layouts.
        for model in ("tied", "untied") if one_rank else (("tied", "untied")[number % 2],):
            chosen = ON_LAYOUTS[:: 2 if layout in ("packed", "small") else 1]
            for name in chosen:
                distill, temperature = MEASURES[name]
                cases.append(
                    Case(
                        f"{model} {name} {layout}",
                        model,
                        layout,
                        distill=distill,
                        temperature=temperature,
                        like=f"{model} {name}",
                    )
                )
    return cases


def taught() -> list[Case]:
    cases = []
    for layout in EVEN.values():
        for teacher in TEACHERS if layout != "4_even" else ("ema", "trust_region", "external"):
            for states in ("hidden_states", "log_probs"):
                if states == "log_probs" and teacher not in ("trust_region", "external"):
                    continue
                model = "untied" if states == "log_probs" else "tied"
                base = f"teacher {teacher} {states}"
                cases.append(
                    Case(
                        base if layout == "plain" else f"{base} {layout}",
                        model,
                        layout,
                        teacher=teacher,
                        distill=[f"teacher.states={states}"],
                        temperature=0.7 if teacher == "trust_region" else 1.0,
                        steps=2,
                        dump=True,
                        like=None if layout == "plain" else base,
                    )
                )
    for world, layout in EVEN.items():
        if world < 4:
            suffix = "" if world == 1 else f" {layout}"
            cases.append(
                Case(f"discrepancy{suffix}", "tied", layout, teacher="external", discrepancy=True, temperature=0.7)
            )
            cases.append(Case(f"no discrepancy{suffix}", "untied", layout, teacher="ema", discrepancy=True))
    return cases


def others() -> list[Case]:
    cases = [
        Case("taught only", layout="one", deal=[[0, 2, 3, 5, 6, 7]]),
        Case("with untaught", layout="one"),
        Case("with padding", layout="one", deal=[[0, 1, -1, 2, 3, 4, 5, 6, 7, -1]]),
        Case("nothing taught", layout="small", deal=[[1, 4, -1]]),
        Case("nothing taught hidden", layout="small", deal=[[1, 4]], distill=MEASURES["jsd_full"][0]),
        Case("nothing taught kept", layout="small", deal=[[1, 4]], distill=MEASURES["jsd_student_kept"][0]),
        Case("nothing taught sampled", layout="small", deal=[[1, 4]], distill=MEASURES["sampled"][0]),
        Case(
            "teacher rows longer than the token budget on one rank only",
            layout="2_uneven",
            deal=[[2, 0, 5], [1, 3, 4, 6, 7]],
            build=["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=16"],
            like="tied jsd_student",
        ),
    ]
    for layout in EVEN.values():
        suffix = "" if layout == "plain" else f" {layout}"

        def add(name: str, layout: str = layout, suffix: str = suffix, **values: Any) -> None:
            cases.append(Case(name + suffix, layout=layout, like=name if suffix else None, **values))

        for name, model, distill in (
            ("mini-batches", "tied", []),
            ("mini-batches kept", "tied", ["teacher.states=log_probs"]),
            ("mini-batches full", "untied", MEASURES["jsd_full"][0]),
        ):
            add(name, model=model, distill=distill, mini_batches=[0, 0, 0, 0, 1, 1, 1, 1], dump=True)
        for name, columns, settings, distill in (
            ("ratio clip", ["old_log_probs"], {}, ["divergence.ratio_clip=1.3"]),
            ("rollout threshold", ["rollout_log_probs"], {"rollout_threshold": 1.2}, []),
            (
                "both ratios",
                ["old_log_probs", "rollout_log_probs"],
                {"rollout_threshold": 1.2},
                ["divergence.ratio_clip=1.3", "divergence.inputs=hidden_states", "divergence.aggregation=token-mean"],
            ),
            ("rollout weights", ["rollout_is_weights"], {}, []),
        ):
            if layout != "4_even" or name == "both ratios":
                add(name, columns=columns, settings=settings, distill=distill)
        for model in ("tied", "untied"):
            for inputs in ("logits", "hidden_states"):
                for off_policy in (False, True):
                    if layout != "plain" and off_policy == (model == "tied") or layout == "4_even" and model == "tied":
                        continue
                    add(
                        f"blend {model} {inputs} {'off' if off_policy else 'on'} policy",
                        model=model,
                        method="sdpo_grpo",
                        distill=["coefficient=0.3", f"divergence.inputs={inputs}"],
                        temperature=0.7,
                        columns=["advantages"] + ["old_log_probs"] * off_policy,
                    )
        for inputs in ("logits", "hidden_states") if layout != "4_even" else ():
            add(
                f"blend entropy {inputs}",
                model="tied",
                method="sdpo_grpo",
                build=["actor_rollout_ref.actor.entropy_coeff=0.02"],
                distill=["coefficient=0.5", f"divergence.inputs={inputs}", "divergence.kind=reverse_kl"],
                columns=["advantages"],
                settings={"calculate_entropy": True},
            )
        if layout != "4_even":
            add("advantage", method="sdpo_token", columns=["advantages"], temperature=0.7)
    # The last two entries are for padding rows: -2 is one of the first mini-batch, -1 of the second.
    for layout, deal in (("one", None), ("2_padded_one", [[7, 6, 5, 3, 2, 0], [-2, 4, 1, -1, -2, -1]])):
        suffix = "" if layout == "one" else f" {layout}"
        for kind in ("value", "slope"):
            for number, mini_batches in enumerate((None, [0, 0, 0, 0, 0, 0, 1, 1, 0, 1])):
                cases.append(
                    Case(
                        f"broken {kind}{' mini-batches' * number}{suffix}",
                        layout=layout,
                        deal=deal,
                        teacher="ema",
                        distill=[f"divergence.kind=ranks_kinds:{kind}", "teacher.states=log_probs"],
                        mini_batches=mini_batches,
                        dump=True,
                    )
                )
    return cases


CASES = {case.name: case for case in (*measured(), *laid_out(), *taught(), *others())}


# ---------------------------------------------------------------------------------------------------------- the oracle


class Oracle:
    """A model in float64, one row at a time."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        self.names = [name for name, _ in self.model.named_parameters()]
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._read: dict[Any, torch.Tensor] = {}

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor] | None) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_((weights or self.start)[name])

    def logits(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        """[T, V] that predict the response."""
        output = self.model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        return output[len(prompt) - 1 : -1]

    @torch.no_grad()
    def read(self, weights: dict[str, torch.Tensor] | None, prompt: list[int], response: list[int]) -> torch.Tensor:
        """The same without gradient; kept for the starting weights."""
        key = (tuple(prompt), tuple(response))
        if weights is None and key in self._read:
            return self._read[key]
        self.load(weights)
        output = self.logits(prompt, response)
        if weights is None:
            self._read[key] = output
        return output


def setting(case: Case, key: str, default: Any) -> Any:
    for entry in reversed(case.distill):
        name, _, value = entry.partition("=")
        if name == key:
            return {"true": True, "false": False}.get(value, value)
    return default


def textbook(kind: str, log_s: torch.Tensor, log_t: torch.Tensor, alpha: float) -> torch.Tensor:
    """Entries [T, C] of the divergence between two distributions."""
    s, t = log_s.exp(), log_t.exp()
    forward, reverse = t * (log_t - log_s), s * (log_s - log_t)
    if kind == "forward_kl":
        return forward
    if kind == "reverse_kl":
        return reverse
    if kind == "mixed":
        return alpha * forward + (1 - alpha) * reverse
    if kind == "jsd":
        log_m = (alpha * t + (1 - alpha) * s).log()
        return alpha * t * (log_t - log_m) + (1 - alpha) * s * (log_s - log_m)
    assert kind == "akl"
    shares = []
    for s_row, t_row in zip(s.detach(), t, strict=True):
        order = sorted(range(len(t_row)), key=lambda i: -float(t_row[i]))
        head, tail, mass = 0.0, 0.0, 0.0
        for place, i in enumerate(order):
            mass += float(t_row[i])
            gap = abs(float(t_row[i] - s_row[i]))
            if place == 0 or mass <= 0.5:
                head += gap
            else:
                tail += gap
        shares.append(head / (head + tail))
    share = torch.tensor(shares, dtype=s.dtype).unsqueeze(-1)
    return share * forward + (1 - share) * reverse


def closed(log_probs: torch.Tensor, tail: bool) -> torch.Tensor:
    """A distribution from the log-probabilities of a support."""
    if not tail:
        return log_probs - log_probs.logsumexp(-1, keepdim=True)
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([log_probs, rest.log()], dim=-1)


def token_divergence(
    case: Case, student: torch.Tensor, teacher: torch.Tensor, chooser: torch.Tensor, tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Divergence [T] and the statistics of a row, from logits; ``chooser``: the student that picks the support."""
    log_s, log_t = (student / case.temperature).log_softmax(-1), (teacher / case.temperature).log_softmax(-1)
    at_s, at_t = log_s.gather(-1, tokens[:, None])[:, 0], log_t.gather(-1, tokens[:, None])[:, 0]
    out = {
        "log_prob": at_s,
        "student_nll": -at_s,
        "gap": at_t - at_s.detach(),
        "teacher_entropy": -(log_t.exp() * log_t).sum(-1),
        "entropy": -(log_s.exp() * log_s).sum(-1),
    }
    kind, support = setting(case, "divergence.kind", "jsd"), setting(case, "divergence.support", "student_topk")
    if kind == "sampled_token":
        out["divergence"] = (at_s - at_t).detach() * at_s
        return out
    if support != "full":
        ids = (teacher if support == "teacher_topk" else chooser).topk(TOPK, dim=-1).indices
        log_s, log_t = log_s.gather(-1, ids), log_t.gather(-1, ids)
        out["student_mass"], out["teacher_mass"] = log_s.detach().exp().sum(-1), log_t.exp().sum(-1)
        tail = setting(case, "divergence.tail", True)
        log_s, log_t = closed(log_s, tail), closed(log_t, tail)
    kind = {"ranks_kinds:value": "forward_kl", "ranks_kinds:slope": "forward_kl"}.get(kind, kind)
    entries = textbook(kind, log_s, log_t, float(setting(case, "divergence.alpha", 0.5)))
    clip, level = setting(case, "divergence.clip", None), setting(case, "divergence.clip_level", "entry")
    if clip is not None and level == "entry":
        entries = entries.clamp(max=float(clip))
    divergence = entries.sum(-1)
    if clip is not None and level == "token":
        divergence = divergence.clamp(max=float(clip))
    out["divergence"] = divergence
    return out


def factors(case: Case, row: dict[str, Any], log_prob: torch.Tensor) -> torch.Tensor:
    """What the tokens of a row are multiplied by."""
    out = torch.ones(len(log_prob), dtype=torch.float64)
    clip, threshold = setting(case, "divergence.ratio_clip", None), case.settings.get("rollout_threshold")
    for limit, name in ((clip, "old_log_probs"), (threshold, "rollout_log_probs")):
        if limit is not None:
            ratio = (log_prob.detach() - torch.tensor(row[name], dtype=torch.float64)).exp()
            out = out * ratio.clamp(max=float(limit))
    if "rollout_is_weights" in case.columns:
        out = out * torch.tensor(row["rollout_is_weights"], dtype=torch.float64)
    return out


def policy_loss(case: Case, row: dict[str, Any], values: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Clipped policy gradient (dual clip at 3) with the entropy bonus, of one row."""
    log_prob = values["log_prob"]
    old = torch.tensor(row["old_log_probs"]).double() if "old_log_probs" in case.columns else log_prob.detach()
    ratio, advantage = (log_prob - old).exp(), torch.tensor(row["advantages"], dtype=torch.float64)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * 3.0), loss)
    if case.settings.get("calculate_entropy"):
        loss = loss - 0.02 * values["entropy"]
    if case.method == "sdpo_token":
        return (loss * mask).sum() / mask.sum() / case.row_count
    return (loss * mask).sum() / case.token_count


@dataclass
class Expected:
    """What one optimiser step should be."""

    loss: float
    distill_loss: float
    gradients: dict[str, torch.Tensor]
    rows: dict[int, dict[str, float]]
    log_ratios: dict[int, torch.Tensor]


class Textbook:
    """The oracles of a session's models, and the rows with what they say about them."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.oracles = {name: Oracle(path) for name, path in models.items()}
        self.rows = {name: make_rows() for name in ("tied", "untied")}
        for name, rows in self.rows.items():
            for row in rows:
                logits = self.oracles[name].read(None, row["prompt"], row["response"])
                log_probs = logits.log_softmax(-1).gather(-1, torch.tensor(row["response"])[:, None])[:, 0].tolist()
                noise = row.pop("noise")
                row["old_log_probs"] = [a + b for a, b in zip(log_probs, noise[::2], strict=True)]
                row["rollout_log_probs"] = [a + b for a, b in zip(log_probs, noise[1::2], strict=True)]

    def teacher_logits(
        self,
        case: Case,
        row: dict[str, Any],
        student: dict[str, torch.Tensor] | None,
        teacher: dict[str, torch.Tensor] | None,
        prompt: str = "teacher_prompt",
    ) -> torch.Tensor:
        """Of ``student`` and ``teacher`` weights before the step; None: the starting ones."""
        prompt, response = row[prompt], row["response"]
        if case.teacher == "external":
            return self.oracles["external"].read(None, prompt, response)
        oracle = self.oracles[case.model]
        if case.teacher == "live":
            return oracle.read(student, prompt, response)
        own = oracle.read(teacher, prompt, response)
        if case.teacher != "trust_region":
            return own
        return 0.95 * own + 0.05 * oracle.read(student, prompt, response)

    def step(
        self,
        case: Case,
        *,
        student: dict[str, torch.Tensor] | None = None,
        before: dict[str, torch.Tensor] | None = None,
        teacher: dict[str, torch.Tensor] | None = None,
        chosen: list[int] = ALL,
    ) -> Expected:
        """Args: weights of the student now and at the passes before the update, and the teacher's."""
        oracle, all_rows = self.oracles[case.model], self.rows[case.model]
        token_mean = setting(case, "divergence.aggregation", "seq-mean-token-mean") == "token-mean"
        coefficient = float(setting(case, "coefficient", 1.0))
        total = distill_total = torch.zeros((), dtype=torch.float64)
        rows: dict[int, dict[str, float]] = {}
        ratios: dict[int, torch.Tensor] = {}
        prepared = {}
        for i in chosen:
            row = all_rows[i]
            kept = setting(case, "teacher.states", "") == "log_probs"
            prepared[i] = (
                self.teacher_logits(case, row, before, teacher),
                oracle.read(before if kept else student, row["prompt"], row["response"]),
            )
        oracle.load(student)
        oracle.model.zero_grad()
        for i in chosen:
            row = all_rows[i]
            mask, tokens = torch.tensor(row["mask"], dtype=torch.float64), torch.tensor(row["response"])
            logits = oracle.logits(row["prompt"], row["response"])
            teacher_logits, chooser = prepared[i]
            values = token_divergence(case, logits, teacher_logits, chooser, tokens)
            if case.method != "sdpo":
                policy = policy_loss(case, row, values, mask)
                total = total + (1 - coefficient if case.method == "sdpo_grpo" else 1.0) * policy
            if row["weight"] == 0:
                continue
            rows[i] = {
                name: float((values[name].detach() * mask).sum() / mask.sum())
                for name in ("divergence", "gap", "teacher_entropy", "student_nll", "student_mass", "teacher_mass")
                if name in values
            }
            ratios[i] = values["gap"]
            if case.method == "sdpo_token":
                continue
            summed = (values["divergence"] * factors(case, row, values["log_prob"]) * mask).sum()
            part = row["weight"] * (summed / case.token_count if token_mean else summed / mask.sum() / case.row_count)
            distill_total = distill_total + part
            total = total + coefficient * part
        total.backward()
        gradients = {name: p.grad.clone() for name, p in oracle.model.named_parameters()}
        return Expected(float(total.detach()), float(distill_total.detach()), gradients, rows, ratios)


# ------------------------------------------------------------------------------------------------- models and processes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints over the tiny world's vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tied = ROOT / "models" / "tiny_world" / "plain"
    found = {"tied": tied}
    for seed, (name, width) in enumerate((("untied", 64), ("external", 48))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=width,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
            # Far from uniform predictions.
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        found[name] = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(found[name])
        AutoTokenizer.from_pretrained(tied).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def textbook_of(models: dict[str, Path]) -> Textbook:
    return Textbook(models)


def spawn(
    folder: Path, cases: list[Case], worlds: list[list[int]], models: dict[str, Path], rows: dict
) -> dict[str, dict[str, Any]]:
    """Runs the cases, and returns what they wrote by name; world sizes of one inner list at the same time."""
    (folder / "ranks_kinds.py").write_text(KINDS)
    planned, plans = [], []
    for together in worlds:
        planned.append([])
        for size in together:
            # Equal settings next to each other: a worker is built once for them.
            mine = sorted((c for c in cases if c.world == size), key=lambda case: case.overrides(models))
            plan = folder / f"world{size}.json"
            plan.write_text(
                json.dumps({"timeout": TIMEOUT, "rows": rows, "cases": [case.plan(models) for case in mine]})
            )
            plans.append((plan, len(mine)))
            planned[-1].append(forked_ranks.World(size, str(plan)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    forked_ranks.run_ranks(PROGRAM, folder, planned, environment, TIMEOUT * len(worlds))
    found = {}
    for plan, count in plans:
        for number in range(count):
            result = torch.load(folder / f"{plan.stem}_{number}.pt", weights_only=False)
            found[result["name"]] = result
    return found


@pytest.fixture(scope="module")
def results(
    models: dict[str, Path], textbook_of: Textbook, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    yield spawn(folder, list(CASES.values()), [[1, 2], [4]], models, textbook_of.rows)


# ------------------------------------------------------------------------------------------------------ the comparisons


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative distance of a parameter's gradient, and its name."""
    assert found.keys() == expected.keys()
    whole = norm(expected)
    worst = (0.0, "")
    for name, value in expected.items():
        size = max(float(value.double().norm()), 1e-3 * whole)
        worst = max(worst, (float((found[name].double() - value.double()).norm()) / size, name))
    return worst


def row_statistics(metrics: dict[str, Any]) -> dict[int, dict[str, float]]:
    names = [key for key in metrics if key.startswith("rows/") and key not in ("rows/id", "rows/token_divergence")]
    ids = metrics.get("rows/id", [])
    assert len(ids) == len(set(ids))
    return {row: {name[5:]: metrics[name][place] for name in names} for place, row in enumerate(ids)}


def check(step: dict[str, Any], expected: list[Expected], case: Case, rtol: float = 1e-4) -> None:
    """One trainer step against what its optimiser steps should be."""
    metrics = step["metrics"]
    assert len(step["gradients"]) == len(expected) == len(metrics["grad_norm"])
    rows = row_statistics(metrics)
    for number, (found, wanted) in enumerate(zip(step["gradients"], expected, strict=True)):
        assert metrics["loss"][number] == pytest.approx(wanted.loss, rel=rtol, abs=1e-7)
        if "distill/loss" in metrics:
            assert metrics["distill/loss"][number] == pytest.approx(wanted.distill_loss, rel=rtol, abs=1e-7)
        else:
            assert case.method == "sdpo_token"
        off, name = distance(found, wanted.gradients)
        assert off < rtol, f"gradient of {name} is off by {off:.2e}"
        assert metrics["grad_norm"][number] == pytest.approx(norm(wanted.gradients), rel=rtol)
        for row, statistics in wanted.rows.items() if rows else ():
            for key, value in statistics.items():
                assert rows[row][key] == pytest.approx(value, rel=rtol, abs=2e-5), (row, key)
    if rows:
        assert sorted(rows) == sorted(row for wanted in expected for row in wanted.rows)
    else:
        assert case.method == "sdpo_token"


def check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """One case on another layout, up to float32's rounding, of which a sum of two teachers has more."""
    first = 5e-5 if "trust_region" in found["name"] else 2e-5
    assert len(found["steps"]) == len(wanted["steps"])
    for number, (step, other) in enumerate(zip(found["steps"], wanted["steps"], strict=True)):
        # A second step starts from weights that differ by rounding already.
        rtol = 3e-4 if number else first
        metrics, others = step["metrics"], other["metrics"]
        for key in ("loss", "grad_norm", "distill/loss", "actor/pg_loss", "actor/entropy_loss"):
            assert (key in metrics) == (key in others)
            if key in others:
                assert metrics[key] == pytest.approx(others[key], rel=rtol, abs=1e-7), key
        rows, other_rows = row_statistics(metrics), row_statistics(others)
        assert rows.keys() == other_rows.keys()
        for row, statistics in other_rows.items():
            assert rows[row] == pytest.approx(statistics, rel=rtol, abs=1e-5), row
        assert len(step["gradients"]) == len(other["gradients"])
        for one, two in zip(step["gradients"], other["gradients"], strict=True):
            off, name = distance(one, two)
            assert off < rtol, f"gradient of {name} is off by {off:.2e}"
        if "teacher" in other:
            off, name = distance(step["teacher"], other["teacher"])
            assert off < 1e-6, f"{name} of the teacher is off by {off:.2e}"
        if "squared_distance" in other:
            assert step["moved"] == other["moved"]
            assert step["squared_distance"] == pytest.approx(other["squared_distance"], rel=1e-4)
        assert step["updated"] == other["updated"]


def single_step(results: dict[str, Any], textbook_of: Textbook, case: Case) -> None:
    (step,) = results[case.name]["steps"]
    check(step, [textbook_of.step(case)], case)


@pytest.mark.parametrize("name", [case.name for case in (*measured(), *laid_out())])
def test_a_gradient_s_projection_is_that_of_the_whole_gradient_on_any_number_of_ranks(name, results):
    (step,) = results[name]["steps"]
    for gradient, found in zip(step["gradients"], step["sketches"], strict=True):
        whole = torch.nn.Module()
        whole.named_parameters = lambda gradient=gradient: ((n, SimpleNamespace(grad=g)) for n, g in gradient.items())
        expected = GradientSketch(64, seed=3).take(whole)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [case.name for case in measured()])
def test_one_rank_has_the_loss_and_gradient_of_the_textbook(name, results, textbook_of):
    single_step(results, textbook_of, CASES[name])


@pytest.mark.parametrize("name", [case.name for case in laid_out()])
def test_micro_batches_packing_and_ranks_change_nothing(name, results):
    check_same(results[name], results[CASES[name].like])


@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.like and case not in laid_out()])
def test_several_ranks_change_nothing_about_teachers_mini_batches_blends_and_factors(name, results):
    check_same(results[name], results[CASES[name].like])


@pytest.mark.parametrize("name", [case.name for case in taught() if case.steps == 2 and not case.like])
def test_the_second_step_has_the_teacher_its_kind_asks_for(name, results, textbook_of):
    case = CASES[name]
    first, second = results[name]["steps"]
    start = textbook_of.oracles[case.model].start
    check(first, [textbook_of.step(case)], case)
    (moved,) = first["weights"]
    assert distance(moved, start)[0] > 1e-3
    teacher = None
    if case.teacher in ("ema", "synced"):
        rate = TEACHERS[case.teacher][1]
        teacher = {name: (1 - rate) * value + rate * moved[name].double() for name, value in start.items()}
        assert first["moved"] == 1.0 and first["updated"]
        assert distance(first["teacher"], teacher)[0] < 1e-6
    elif case.teacher != "live":
        teacher = textbook_of.oracles["external" if case.teacher == "external" else case.model].start
        assert distance(first["teacher"], teacher)[0] == 0.0
    if case.teacher in ("ema", "synced", "frozen", "trust_region"):
        expected = sum(float((moved[name].double() - value).square().sum()) for name, value in teacher.items())
        assert first["squared_distance"] == pytest.approx(expected, rel=1e-4, abs=1e-10)
    assert ("teacher" in first) == (case.teacher != "live")
    check(second, [textbook_of.step(case, student=moved, before=moved, teacher=teacher)], case)


@pytest.mark.parametrize(
    "name", [case.name for case in CASES.values() if case.method == "sdpo" and not case.discrepancy]
)
def test_the_store_holds_what_the_settings_say_and_nothing_after_the_update(name, results):
    case = CASES[name]
    one_token = setting(case, "divergence.kind", "") == "sampled_token"
    support = setting(case, "divergence.support", "student_topk")
    states = setting(case, "teacher.states", "log_probs" if one_token or support == "teacher_topk" else "hidden_states")
    for step in results[name]["steps"]:
        assert step["store_rows"] == 0 and not step["store_head"]
        for hidden, ids, log_probs in step["kept"]:
            if states == "hidden_states":
                assert (hidden, ids, log_probs) == (True, False, False)
            else:
                assert not hidden
        if states == "hidden_states":
            here = (case.deal or LAYOUTS[case.layout].deal)[0]
            assert len(step["kept"]) == sum(i >= 0 and WEIGHTS[i] != 0 for i in here)


@pytest.mark.parametrize("name", ["mini-batches", "mini-batches kept", "mini-batches full"])
def test_a_later_mini_batch_is_compared_from_the_weights_it_finds(name, results, textbook_of):
    case = CASES[name]
    (step,) = results[name]["steps"]
    parts = [[i for i in ALL if case.mini_batches[i] == number] for number in (0, 1)]
    first = textbook_of.step(case, chosen=parts[0])
    second = textbook_of.step(case, student=step["weights"][0], chosen=parts[1])
    check(step, [first, second], case)


def test_the_support_of_a_later_mini_batch_depends_on_where_the_teacher_states_are_kept(results):
    # Otherwise the two tests above could not tell one from the other.
    now, kept = (results[name]["steps"][0] for name in ("mini-batches", "mini-batches kept"))
    assert distance(now["gradients"][0], kept["gradients"][0])[0] < 2e-5
    assert distance(now["gradients"][1], kept["gradients"][1])[0] > 1e-3


FACTORS = ["ratio clip", "rollout threshold", "both ratios", "rollout weights"]
BLENDS = [case.name for case in others() if case.method != "sdpo" and not case.like]


@pytest.mark.parametrize("name", FACTORS + BLENDS)
def test_factors_and_blends_have_the_loss_and_gradient_of_the_textbook(name, results, textbook_of):
    single_step(results, textbook_of, CASES[name])


@pytest.mark.parametrize("name", [name for name in BLENDS if "logits" in name])
def test_a_blend_is_the_same_from_logits_and_from_hidden_states(name, results):
    check_same(results[name.replace("logits", "hidden_states")], results[name])


@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.method == "sdpo_token"])
def test_the_advantage_carries_the_log_ratio_of_teacher_and_student(name, results, textbook_of):
    expected = textbook_of.step(CASES["advantage"]).log_ratios
    (step,) = results[name]["steps"]
    found = {row: values for part in step["ratios"] for row, values in part.items()}
    assert sorted(found) == ALL
    for row, values in found.items():
        wanted = expected[row].tolist() if row in expected else [0.0] * len(values)
        assert values == pytest.approx(wanted, rel=1e-4, abs=2e-5)


def test_rows_of_weight_zero_and_padding_rows_change_no_bit(results):
    alone, *others_ = (results[name]["steps"][0] for name in ("taught only", "with untaught", "with padding"))
    for other in others_:
        assert other["metrics"]["loss"] == alone["metrics"]["loss"] and math.isfinite(alone["metrics"]["loss"][0])
        for name, gradient in alone["gradients"][0].items():
            assert torch.equal(other["gradients"][0][name], gradient), name


@pytest.mark.parametrize("name", [case.name for case in others() if case.name.startswith("nothing taught")])
def test_a_batch_without_a_distilled_row_has_loss_and_gradient_zero(name, results):
    (step,) = results[name]["steps"]
    assert step["metrics"]["loss"] == [0.0] and step["metrics"]["grad_norm"] == [0.0]
    assert all(not gradient.any() for gradient in step["gradients"][0].values())


@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.discrepancy])
def test_the_self_check_measures_teacher_against_student_on_the_students_prompts(name, results, textbook_of):
    case = CASES[name]
    found = results[name]["discrepancy"]
    assert len(found) == case.world
    for (mean, largest), rows in zip(found.tolist(), LAYOUTS[case.layout].deal, strict=True):
        if case.teacher == "ema":
            assert abs(mean) < 1e-6 and largest < 1e-5
            continue
        values = []
        for i in rows:
            row = textbook_of.rows[case.model][i]
            student = textbook_of.oracles[case.model].read(None, row["prompt"], row["response"])
            teacher = textbook_of.teacher_logits(case, row, None, None, "prompt")
            values += token_divergence(case, student, teacher, student, torch.tensor(row["response"]))[
                "divergence"
            ].tolist()
        assert mean == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert largest == pytest.approx(max(values), rel=1e-4)


@pytest.mark.parametrize("suffix", ["", " 2_padded_one"])
@pytest.mark.parametrize("kind", ["value", "slope"])
def test_a_step_that_is_not_finite_moves_neither_student_nor_teacher(kind, suffix, results, textbook_of):
    name = f"broken {kind}{suffix}"
    (step,) = results[name]["steps"]
    assert math.isnan(step["metrics"]["grad_norm"][0])
    assert math.isnan(step["metrics"]["loss"][0]) == (kind == "value")
    assert step["updated"] is False and step["moved"] == 0.0 and step["squared_distance"] == 0.0
    for parameter, value in textbook_of.oracles["tied"].start.items():
        assert torch.equal(step["weights"][0][parameter].double(), value), parameter
        assert torch.equal(step["teacher"][parameter].double(), value), parameter


@pytest.mark.parametrize("suffix", ["", " 2_padded_one"])
@pytest.mark.parametrize("kind", ["value", "slope"])
def test_a_finite_mini_batch_after_one_that_is_not_trains(kind, suffix, results, textbook_of):
    case = CASES[f"broken {kind} mini-batches{suffix}"]
    (step,) = results[case.name]["steps"]
    first, second = step["metrics"]["grad_norm"]
    assert math.isnan(first) and math.isfinite(second)
    assert step["updated"] is True and step["moved"] == 1.0
    start = textbook_of.oracles["tied"].start
    assert all(torch.equal(value.double(), start[name]) for name, value in step["weights"][0].items())
    expected = textbook_of.step(case, chosen=[6, 7])
    assert distance(step["gradients"][1], expected.gradients)[0] < 1e-4
    assert step["metrics"]["loss"][1] == pytest.approx(expected.loss, rel=1e-4)
    assert distance(step["weights"][1], start)[0] > 1e-3
