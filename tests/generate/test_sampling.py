"""Sampling: what is drawn, how often, and what is refused."""

import pytest
import torch

from ernieq.errors import NonFiniteError, UsageError
from ernieq.generate import GenerateOptions, Sampler

LOGITS = torch.tensor([0.5, 0.2, 0.3, 0.0]).clamp(min=1e-6).log() + 3.0


def frequencies(options: GenerateOptions, draws: int = 4000) -> list[float]:
    sampler = Sampler(options)
    counts = torch.tensor([sampler.choose(LOGITS) for _ in range(draws)]).bincount(minlength=4)
    return [count / draws for count in counts.tolist()]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_draw_on_the_device_has_the_same_distribution(top_p: float) -> None:
    sampler, other = (Sampler(GenerateOptions(temperature=1, top_p=top_p, seed=seed)) for seed in (0, 1))
    drawn = torch.cat([sampler.draw(LOGITS) for _ in range(4000)])
    expected = [0.5, 0.2, 0.3, 0.0] if top_p == 1 else [0.625, 0, 0.375, 0]
    assert (drawn.bincount(minlength=4) / 4000).tolist() == pytest.approx(expected, abs=0.03)
    again = Sampler(GenerateOptions(temperature=1, top_p=top_p))
    assert [again.read(again.draw(LOGITS)) for _ in range(40)] == drawn[:40].tolist()
    assert [other.read(other.draw(LOGITS)) for _ in range(40)] != drawn[:40].tolist()


def test_a_draw_on_the_device_refuses_what_is_not_finite_when_it_is_read() -> None:
    greedy, drawing = Sampler(GenerateOptions(temperature=0)), Sampler(GenerateOptions(temperature=1e-30))
    assert greedy.read(greedy.draw(LOGITS)) == drawing.read(drawing.draw(LOGITS)) == 0
    for sampler in (greedy, drawing):
        for value in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(NonFiniteError, match="logits"):
                sampler.read(sampler.draw(torch.tensor([0.0, value])))


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert frequencies(GenerateOptions(temperature=0), 5) == [1.0, 0.0, 0.0, 0.0]


def test_at_temperature_one_tokens_come_as_often_as_their_probability_says() -> None:
    found = frequencies(GenerateOptions(temperature=1, top_p=1))
    assert found == pytest.approx([0.5, 0.2, 0.3, 0.0], abs=0.03)


def test_a_lower_temperature_sharpens() -> None:
    squares = [0.25, 0.04, 0.09, 0.0]
    expected = [square / sum(squares) for square in squares]
    assert frequencies(GenerateOptions(temperature=0.5, top_p=1)) == pytest.approx(expected, abs=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_the_sum() -> None:
    assert frequencies(GenerateOptions(temperature=1, top_p=0.7)) == pytest.approx(
        [0.625, 0, 0.375, 0], abs=0.03
    )
    assert frequencies(GenerateOptions(temperature=1, top_p=0.01), 50) == [1.0, 0.0, 0.0, 0.0]


def test_a_seed_fixes_all_draws_and_another_gives_others() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(GenerateOptions(seed=seed))
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_draws_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    Sampler(GenerateOptions(seed=1)).choose(LOGITS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert Sampler(GenerateOptions(temperature=1e-30)).choose(LOGITS * 1e30) == 0


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="logits"):
        Sampler(GenerateOptions()).choose(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateOptions(**changes)  # type: ignore[arg-type]
