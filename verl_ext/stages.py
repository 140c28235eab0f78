"""Which part of a run a step belongs to, and before which steps the run takes its pass rates.

Everything follows from the number of steps done, so a resumed run stands where an uninterrupted one would.
"""

from __future__ import annotations

from verl_ext.config import DistillConfig


def step_at(fraction: float, steps: int) -> int:
    """Steps done at a fraction of a run; at least one is before it and one after it where there are two."""
    return min(max(round(fraction * steps), 1), steps - 1)


def switch_step(distill: DistillConfig, steps: int) -> int | None:
    """Steps of the first stage, of ``steps`` in all; None: one stage. At least one step is in each.

    Raises:
        ValueError: fewer than two steps cannot have two stages.
    """
    if distill.schedule.switch is None:
        return None
    if steps < 2:
        raise ValueError(f"distill.schedule.switch needs run.steps of at least 2, found {steps}")
    return step_at(distill.schedule.switch, steps)


def stages(distill: DistillConfig) -> list[DistillConfig]:
    """The blocks of the run's stages, one or two."""
    return [distill] if distill.schedule.switch is None else [distill, distill.second_stage()]


def stage_after(distill: DistillConfig, done: int, steps: int) -> DistillConfig:
    """The block of the step that follows ``done`` steps."""
    switch = switch_step(distill, steps)
    return distill if switch is None or done < switch else distill.second_stage()


def rates_due(distill: DistillConfig, steps: int) -> list[int]:
    """Ascending numbers of steps done at which the run takes pass rates with its present weights (PACED, recompute).

    0 where the weights come from a store and none is given.
    """
    if not distill.enabled:
        return []
    due: set[int] = set()
    first, switch = distill.weighting, switch_step(distill, steps)
    second = first if switch is None else distill.second_stage().weighting
    if first.rates == "store" and first.store is None:
        due.add(0)
    if switch is not None and second.rates == "store":
        # Not where it names a store of its own; in any case where none is left to it.
        named = second.store is not None and second.store != first.store
        without = second.store is None and (first.rates != "store" or first.store is not None)
        if without or (distill.schedule.recompute_pass_rates and not named):
            due.add(switch)
    for done in range(1, steps):
        block = first if switch is None or done < switch else second
        if block.rates != "store":
            continue
        at = None if block.recompute_at is None else step_at(block.recompute_at, steps)
        if done == at or (block.recompute_every is not None and done % block.recompute_every == 0):
            due.add(done)
    return sorted(due)


def rates_from(distill: DistillConfig, done: int, steps: int) -> int | str | None:
    """Whose pass rates weigh the step that follows ``done`` steps.

    A number: those that the run took after as many steps; a text: the folder of a store; None: the step has none.
    """
    weighting, switch = stage_after(distill, done, steps).weighting, switch_step(distill, steps)
    if not distill.enabled or weighting.rates != "store":
        return None
    in_second = switch is not None and done >= switch
    taken = [at for at in rates_due(distill, steps) if at <= done]
    if in_second and weighting.store not in (None, distill.weighting.store):
        # Of its own: rates taken in the first stage are behind it.
        taken = [at for at in taken if at >= switch]
    return taken[-1] if taken else weighting.store
