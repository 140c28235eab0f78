"""Two Ulysses ranks hold what one would: each its part of the packed tokens, and together the same passes and losses.

The ranks take turns in one process. What a rank would add up over the group is recorded in a first run of every rank,
and handed out in a second one; one test runs two real processes.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from verl_ext import passes
from verl_ext.chunks import Head, Logits
from verl_ext.config import DistillConfig, distill_config
from verl_ext.packing import to_jagged
from verl_ext.passes import ROW_ID, StudentPass, TeacherPass, responses
from verl_ext.row_store import STORE
from verl_ext.sequence_parallel import Part, current_part
from verl_ext.student_values import Discrepancy, student_values

PROMPTS, RESPONSES, ROW_IDS = [2, 1, 4], [3, 5, 2], [10, -1, 12]
TOKENS = sum(PROMPTS) + sum(RESPONSES)
VOCABULARY, WIDTH, TOPK, TEMPERATURE = 11, 6, 4, 1.3
CHOSEN = torch.tensor([True, False, True])
FORMS = {
    "student_topk, hidden states": {"divergence": {"topk": TOPK}},
    "student_topk, log-probabilities": {"divergence": {"topk": TOPK}, "teacher": {"states": "log_probs"}},
    "teacher_topk, log-probabilities": {"divergence": {"topk": TOPK, "support": "teacher_topk"}},
    "full": {"divergence": {"support": "full", "tail": False}},
    "sampled_token": {"divergence": {"kind": "sampled_token"}},
}
each_form = pytest.mark.parametrize("form", FORMS)
each_size = pytest.mark.parametrize("ranks", [2, 3, 5])


@pytest.fixture(autouse=True)
def empty_store():
    STORE.clear()
    yield
    STORE.clear()


@pytest.fixture
def data() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (p + r,), generator=generator) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return TensorDict(
        {
            "input_ids": to_jagged(rows),
            "responses": to_jagged([row[p:] for row, p in zip(rows, PROMPTS, strict=True)]),
            "temperature": torch.full((3,), TEMPERATURE),
            ROW_ID: torch.tensor(ROW_IDS),
        },
        batch_size=3,
    )


def head(seed: int) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return Head(
        torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.7
    )


def held(values: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part as verl cuts it: equal parts of the tokens padded at the end; what pads is never read."""
    size = math.ceil(len(values) / ranks)
    padding = torch.full((size * ranks - len(values), *values.shape[1:]), math.nan, dtype=values.dtype)
    return torch.cat([values, padding])[rank * size : (rank + 1) * size]


class Ranks:
    """Runs a function once for each rank of a sequence-parallel group, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.monkeypatch, self.size = monkeypatch, size

    def __call__(self, function: Callable[[int], Any]) -> list[tuple[Any, dict]]:
        """Result and rows of the store, by rank; the store is the same before each."""
        before, head_before = copy.deepcopy(STORE._rows), STORE.teacher_head
        given: list[list[torch.Tensor]] = [[] for _ in range(self.size)]

        def run(rank: int, all_reduce: Callable[..., None]) -> tuple[Any, dict]:
            STORE.clear()
            STORE._rows.update(copy.deepcopy(before))
            STORE.teacher_head = head_before
            with self.monkeypatch.context() as patch:
                patch.setattr("verl_ext.passes.current_part", lambda: Part(rank, self.size))
                patch.setattr(torch.distributed, "all_reduce", all_reduce)
                return function(rank), dict(STORE._rows)

        for rank in range(self.size):
            run(rank, lambda whole, group=None, rank=rank: given[rank].append(whole.clone()))
        results = []
        for rank in range(self.size):
            turns = iter(list(zip(*given, strict=True)))
            results.append(run(rank, lambda whole, group=None, turns=turns: whole.copy_(sum(next(turns)))))
            assert next(turns, None) is None, "every rank calls as often as the others"
        return results


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch, 2)


def same_rows(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for row_id, state in expected.items():
        for name, value in vars(state).items():
            other = getattr(found[row_id], name)
            assert (other is None) == (value is None), name
            if value is not None:
                assert other.dtype == value.dtype
                torch.testing.assert_close(other, value)


# --------------------------------------------------------------------------------------------------------- the parts


def test_one_rank_holds_everything() -> None:
    part, positions = Part(), torch.tensor([0, 3, 5])
    assert part.own(positions, 6) is None and part.first(6) == 0
    values = torch.arange(3.0)
    assert part.completed(values, None) is values


def test_a_rank_owns_the_positions_of_its_part_and_counts_from_its_first_row() -> None:
    positions = torch.tensor([1, 2, 3, 5, 6, 7])
    owners = [Part(rank, 3).own(positions, 3) for rank in range(3)]
    assert [positions[own].tolist() for own in owners] == [[1, 2], [3, 5], [6, 7]]
    assert [Part(rank, 3).first(3) for rank in range(3)] == [0, 3, 6]
    assert (sum(own.int() for own in owners) == 1).all()


def test_a_rank_may_hold_padding_or_prompts_alone() -> None:
    positions = torch.tensor([1, 2])
    assert not Part(1, 2).own(positions, 4).any()


def test_values_are_put_in_the_order_of_all_positions(two: Ranks) -> None:
    own = torch.tensor([True, False, True, True])
    values = torch.tensor([[1, 1], [3, 3], [4, 4]], dtype=torch.int32)

    def completed(rank: int) -> torch.Tensor:
        mine = own if rank == 0 else ~own
        return Part(rank, 2).completed(values if rank == 0 else torch.tensor([[2, 2]], dtype=torch.int32), mine)

    for result, _ in two(completed):
        assert result.tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]] and result.dtype == torch.int32


@each_size
def test_every_response_token_is_held_once(data: TensorDict, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    rows = math.ceil(TOKENS / ranks)
    found = []
    for rank in range(ranks):
        monkeypatch.setattr("verl_ext.passes.current_part", lambda rank=rank: Part(rank, ranks))
        where = responses(data, rows)
        assert where.sizes == RESPONSES
        assert ((where.positions >= 0) & (where.positions < rows)).all()
        assert torch.equal(where.tokens, where.held(data["responses"].values()))
        found += (where.positions + rank * rows).tolist()
    monkeypatch.undo()
    assert found == responses(data, TOKENS).positions.tolist()


def test_the_part_is_verl_s_group_and_one_rank_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.utils import ulysses

    monkeypatch.setattr(ulysses, "get_ulysses_sequence_parallel_group", lambda: None)
    assert current_part() == Part()
    monkeypatch.setattr(ulysses, "get_ulysses_sequence_parallel_group", lambda: "group")
    monkeypatch.setattr(ulysses, "get_ulysses_sequence_parallel_rank", lambda group=None: 3)
    monkeypatch.setattr(ulysses, "get_ulysses_sequence_parallel_world_size", lambda group=None: 4)
    assert current_part() == Part(3, 4, "group")


# -------------------------------------------------------------------------------------------------------- the passes


def source(kind: str, whole: Head, rank: int | None = None, ranks: int = 1) -> Head | Logits:
    """The model's output, or a rank's part of it."""
    if kind == "hidden_states":
        return whole if rank is None else Head(held(whole.hidden, rank, ranks), whole.weight)
    logits = whole.hidden @ whole.weight.t() / TEMPERATURE
    return Logits(logits if rank is None else held(logits, rank, ranks))


def every_pass(support: str) -> list[tuple[Callable[[], StudentPass | TeacherPass], Head, str]]:
    return [
        (lambda: StudentPass(TOPK), head(1), "logits"),
        (lambda: TeacherPass("log_probs", support=support, topk=TOPK), head(2), "hidden_states"),
        (lambda: TeacherPass("hidden_states", share=0.25), head(2), "hidden_states"),
    ]


@pytest.mark.parametrize("support", ["none", "given", "teacher_topk"])
@each_size
def test_every_rank_is_left_what_one_rank_alone_is(
    data: TensorDict, monkeypatch: pytest.MonkeyPatch, support: str, ranks: int
) -> None:
    """Rows whose response lies in another rank's part as well: every rank trains, and so reads, all of them."""
    for make, whole, kind in every_pass(support):
        rows = copy.deepcopy(STORE._rows)
        run = Ranks(monkeypatch, ranks)
        results = run(lambda rank, w=whole, k=kind, m=make: m().collect(source(k, w, rank, ranks), data))  # noqa: B023
        STORE._rows.clear()
        STORE._rows.update(rows)
        make().collect(source(kind, whole), data)
        for _, found in results:
            same_rows(found, STORE._rows)
    assert set(STORE._rows) == {10, 12}


# -------------------------------------------------------------------------------------------------------- the update


def teach(data: TensorDict, config: DistillConfig) -> None:
    if config.support_pass:
        StudentPass(TOPK).collect(head(1), data)
    support = {"student_topk": "given"}.get(config.divergence.support, config.divergence.support)
    teacher = TeacherPass(config.teacher_states, support="none" if config.one_token else support, topk=TOPK)
    teacher.collect(head(2), data)
    teacher.leave_head()


@each_form
@each_size
@pytest.mark.parametrize("kind", ["logits", "hidden_states"])
def test_the_parts_of_the_values_and_of_the_gradient_are_one_rank_s_together(
    data: TensorDict, monkeypatch: pytest.MonkeyPatch, form: str, ranks: int, kind: str
) -> None:
    config = distill_config(FORMS[form])
    teach(data, config)
    weights = torch.linspace(0.5, 2.0, TOKENS)

    def update(rank: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        mine = source(kind, head(1), rank, ranks)
        leaf = mine.hidden if kind == "hidden_states" else mine.values
        leaf.requires_grad_()
        if kind == "hidden_states":
            mine.weight.requires_grad_()
        values = student_values(mine, data, CHOSEN, config, log_probs_of_all=True, entropy=True)
        factors = weights if rank is None else held(weights, rank, ranks).nan_to_num()
        ((values["divergence"] + values["log_probs"] - 0.2 * values["entropy"]) * factors).sum().backward()
        return values, leaf.grad, mine.weight.grad if kind == "hidden_states" else None

    expected, gradient, head_gradient = update(None)
    parts = [part for part, _ in Ranks(monkeypatch, ranks)(update)]
    for name, value in expected.items():
        joined = torch.cat([part[0][name] for part in parts])
        torch.testing.assert_close(joined[:TOKENS], value, msg=lambda text, name=name: f"{name}: {text}")
        assert (joined[TOKENS:] == 0).all()
    torch.testing.assert_close(torch.cat([part[1] for part in parts])[:TOKENS], gradient)
    assert all(torch.isfinite(part[1]).all() for part in parts)
    if head_gradient is not None:
        torch.testing.assert_close(sum(part[2] for part in parts), head_gradient)


@each_form
def test_a_rank_whose_part_holds_no_chosen_response_keeps_a_zero_in_the_graph(
    data: TensorDict, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    config = distill_config(FORMS[form])
    teach(data, config)
    only_first = torch.tensor([True, False, False])  # predicted at 1 to 3: all in the first half
    monkeypatch.setattr("verl_ext.passes.current_part", lambda: Part(1, 2))
    part = source("hidden_states", head(1), 1, 2)
    part.hidden.requires_grad_()
    values = student_values(part, data, only_first, config)
    assert all((value == 0).all() for value in values.values()) and values["divergence"].requires_grad
    values["divergence"].sum().backward()
    assert (part.hidden.grad == 0).all()


def test_the_self_check_of_every_rank_is_that_of_one(data: TensorDict, two: Ranks) -> None:
    config = distill_config(FORMS["full"])
    teach(data, config)
    alone = Discrepancy(config)
    alone.collect(head(1), data)

    def check(rank: int) -> tuple[float, int, float]:
        found = Discrepancy(config)
        found.collect(source("hidden_states", head(1), rank, 2), data)
        return found.total, found.tokens, found.largest

    for found, _ in two(check):
        assert found == (pytest.approx(alone.total), alone.tokens, pytest.approx(alone.largest))
    assert alone.tokens == RESPONSES[0] + RESPONSES[2]


# ----------------------------------------------------------------------------------------------------- two processes


def leave_a_part(rank: int, folder: Path, data: TensorDict, teacher: Head) -> None:
    """In a process of its own: this rank's teacher passes, and what they left."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    passes.current_part = lambda: Part(rank, 2, torch.distributed.group.WORLD)
    part = Head(held(teacher.hidden, rank, 2), teacher.weight)
    TeacherPass("log_probs", support="teacher_topk", topk=TOPK).collect(part, data)
    TeacherPass("hidden_states").collect(part, data)
    torch.save({row_id: vars(state) for row_id, state in STORE._rows.items()}, folder / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_left_what_one_is(data: TensorDict, tmp_path: Path) -> None:
    """Forked, because importing torch anew takes longer than all of these tests."""
    teacher = head(2)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=leave_a_part, args=(rank, tmp_path, data, teacher)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    TeacherPass("log_probs", support="teacher_topk", topk=TOPK).collect(teacher, data)
    TeacherPass("hidden_states").collect(teacher, data)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt")
        assert set(found) == {10, 12}
        for row_id, state in found.items():
            for name, value in vars(STORE[row_id]).items():
                assert (state[name] is None) == (value is None)
                if value is not None:
                    torch.testing.assert_close(state[name], value)
