"""The loop: against a forward pass over everything, on small random models."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ernieq.checkpoint import load_tokenizer
from ernieq.cli.generate import generate as command
from ernieq.errors import CheckpointError, UsageError
from ernieq.generate import GenerateOptions, Sampler, encode_prompt, generate_text, generate_tokens
from ernieq.generate.engine import make_engine
from ernieq.generate.loop import _choose, _choose_ahead
from ernieq.load import load_model
from ernieq.model import ErnieForCausalLM

GREEDY = GenerateOptions(max_tokens=12, temperature=0)
TinyFactory = Callable[..., Path]


def greedy_without_cache(model: ErnieForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_full_forward_passes(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernieq.generate.engine._PROMPT_PART", 3)  # the prompt goes through in three parts
    model = load_model(tiny())
    prompt = [1, 9, 30, 4, 17, 8, 50]
    assert list(generate_tokens(model, prompt, GREEDY)) == greedy_without_cache(model, prompt, 12)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_steps_taken_before_a_token_is_read_give_the_same_tokens(
    temperature: float, tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = load_model(tiny()), [1, 9, 30]
    options = dataclasses.replace(GREEDY, temperature=temperature)
    expected = list(_choose(make_engine(model, 15), DrawingSampler(options), prompt, 12))
    assert list(_choose_ahead(make_engine(model, 15), Sampler(options), prompt, 12)) == expected


class DrawingSampler(Sampler):
    """Draws as on a GPU, but waits for each token."""

    def choose(self, logits: torch.Tensor) -> int:
        return self.read(self.draw(logits))


def test_an_end_token_ends_the_sequence_and_is_not_part_of_it(tiny: TinyFactory) -> None:
    model = load_model(tiny())
    tokens = greedy_without_cache(model, [1, 9], 12)
    end = tokens[5]
    assert list(generate_tokens(model, [1, 9], GREEDY, ends={end})) == tokens[: tokens.index(end)]


def test_a_sequence_ends_where_the_model_has_no_more_positions(tiny: TinyFactory) -> None:
    model = load_model(tiny(config={"max_position_embeddings": 8}))
    assert len(list(generate_tokens(model, [1, 9, 30], GREEDY))) == 5
    with pytest.raises(UsageError, match="the prompt has 8 tokens; allowed are 1 to 7"):
        next(generate_tokens(model, [3] * 8, GREEDY))


def test_a_prompt_of_no_tokens_is_refused(tiny: TinyFactory) -> None:
    with pytest.raises(UsageError, match="the prompt has 0 tokens"):
        next(generate_tokens(load_model(tiny()), [], GREEDY))


def test_a_token_beyond_the_vocabulary_is_refused(tiny: TinyFactory) -> None:
    with pytest.raises(CheckpointError, match="gives the token 64; the model's vocabulary ends at 63"):
        next(generate_tokens(load_model(tiny()), [64], GREEDY))


def test_a_prompt_begins_with_the_begin_of_text_token(tiny: TinyFactory) -> None:
    assert encode_prompt(load_tokenizer(tiny()), "w5 w6") == [1, 5, 6]
    assert encode_prompt(load_tokenizer(tiny()), "") == [1]


def test_a_text_is_that_of_its_tokens(tiny: TinyFactory) -> None:
    directory = tiny()
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    seen: list[int] = []
    text = "".join(generate_text(model, tokenizer, "w5 w6", GREEDY, on_token=seen.append))
    assert seen == greedy_without_cache(model, [1, 5, 6], len(seen))
    assert text.split() == tokenizer.decode(seen, skip_special_tokens=True).split()
    assert text.startswith(" ")


def test_a_text_ends_before_a_stop_string(tiny: TinyFactory) -> None:
    directory = tiny()
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    options = GenerateOptions(max_tokens=12, temperature=1.5, seed=1)
    words = "".join(generate_text(model, tokenizer, "w5", options)).split()
    stopped = dataclasses.replace(options, stop=(words[3],))
    assert "".join(generate_text(model, tokenizer, "w5", stopped)).split() == words[: words.index(words[3])]


def test_the_same_seed_gives_the_same_text(tiny: TinyFactory) -> None:
    directory = tiny()
    model, tokenizer = load_model(directory), load_tokenizer(directory)

    def text(seed: int) -> str:
        options = GenerateOptions(max_tokens=20, temperature=1.5, top_p=1, seed=seed)
        return "".join(generate_text(model, tokenizer, "w5", options))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_command_prints_the_completion_and_the_speed(tiny: TinyFactory) -> None:
    directory = tiny()
    arguments = [str(directory), "w5 w6", "--temperature", "0", "--max-tokens", "6", "--device", "cpu"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    expected = "".join(
        generate_text(
            load_model(directory),
            load_tokenizer(directory),
            "w5 w6",
            GenerateOptions(max_tokens=6, temperature=0),
        )
    )
    assert result.exit_code == 0
    assert result.stdout == expected + "\n"
    assert "tokens" in result.stderr


def test_the_command_leaves_bad_options_to_the_error_tree(tiny: TinyFactory) -> None:
    with pytest.raises(UsageError, match="top_p is 7"):
        CliRunner().invoke(command, [str(tiny()), "w5", "--top-p", "7"], catch_exceptions=False)
