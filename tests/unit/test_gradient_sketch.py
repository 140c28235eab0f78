"""The random projection of a gradient: linear, the same for the same seed, and unbiased in inner products."""

from __future__ import annotations

import pytest
import torch

from verl_ext import gradient_sketch
from verl_ext.gradient_sketch import GradientSketch


def module(*shapes: tuple[int, ...], seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Module()
    for i, shape in enumerate(shapes):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator)
        made.register_parameter(f"p{i}", parameter)
    return made


def flat(made: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in made.parameters()]).double()


def sketched(made: torch.nn.Module, dimensions: int = 512, seed: int = 0) -> torch.Tensor:
    return GradientSketch(dimensions, seed).take(made)


def test_it_is_linear_and_depends_on_the_seed_only() -> None:
    one, other = module((40, 7), (13,), seed=1), module((40, 7), (13,), seed=2)
    both = module((40, 7), (13,))
    for parameter, a, b in zip(both.parameters(), one.parameters(), other.parameters(), strict=True):
        parameter.grad = 2 * a.grad - 3 * b.grad
    assert torch.allclose(sketched(both), 2 * sketched(one) - 3 * sketched(other), atol=1e-5)
    assert torch.equal(sketched(one), sketched(one))
    assert not torch.equal(sketched(one), sketched(one, seed=1))


def test_every_entry_goes_to_one_place_with_a_sign_and_places_and_signs_are_even() -> None:
    entries, dimensions = 20000, 50
    places, signs = [], []
    for start in range(0, entries, 2000):
        made = module((entries,))
        made.p0.grad.zero_()
        made.p0.grad[start] = 1.0
        result = sketched(made, dimensions)
        (place,) = result.nonzero().flatten().tolist()
        assert abs(float(result[place])) == 1.0
        places.append(place)
        signs.append(float(result[place]))
    assert len(set(places)) > 5 and len(set(signs)) == 2
    made = module((entries,))
    made.p0.grad.fill_(1.0)
    # Sums of random signs: a fixed sign or a crowded place would be far off.
    result = sketched(made, dimensions)
    assert abs(float(result.sum())) < 5 * entries**0.5
    assert float(result.square().sum()) == pytest.approx(entries, rel=0.5)


def test_inner_products_are_unbiased() -> None:
    one, other = module((30, 11), (17,), seed=1), module((30, 11), (17,), seed=2)
    for parameter, a in zip(other.parameters(), one.parameters(), strict=True):
        parameter.grad = parameter.grad + a.grad
    wanted = float(flat(one) @ flat(other))
    found = torch.tensor([float(sketched(one, 64, seed) @ sketched(other, 64, seed)) for seed in range(300)])
    error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean()) - wanted) < 4 * error
    assert float(found.std()) < 0.3 * wanted


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module((50, 9), (31,))
    whole = sketched(made)
    monkeypatch.setattr(gradient_sketch, "PIECE", 7)
    assert torch.allclose(sketched(made), whole, atol=1e-12)


def test_parameters_of_other_names_do_not_share_places() -> None:
    first, second = module((64,), (64,)), module((64,), (64,))
    first.p1.grad, second.p0.grad = None, None
    second.p1.grad = first.p0.grad.clone()
    assert not torch.allclose(sketched(first), sketched(second))


def test_no_gradient_is_a_vector_of_zeros_and_a_bad_size_is_refused() -> None:
    made = module((5,))
    made.p0.grad = None
    assert torch.equal(sketched(made, 8), torch.zeros(8, dtype=torch.float64))
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="dimensions"):
            GradientSketch(bad)
