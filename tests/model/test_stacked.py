"""Batched products of all experts are those of the experts one by one, and so are the gradients of scales."""

from __future__ import annotations

import torch

from ernieq.checkpoint import open_checkpoint
from ernieq.model import Experts, StackedExperts
from ernieq.model.mlp import Routing
from tests.model.models import NANO

TOKENS, EXPERTS, CHOICES, HIDDEN, WIDTH = 40, 5, 2, 16, 24


def some_routing(generator: torch.Generator) -> Routing:
    """Expert 3 gets no token, expert 0 gets one of each token's two choices."""
    others = torch.tensor([1, 2, 4])[torch.randint(3, (TOKENS,), generator=generator)]
    selected = torch.stack([others, torch.zeros_like(others)], dim=1)
    weights = torch.rand(TOKENS, CHOICES, generator=generator)
    return Routing(selected, weights, torch.empty(0))


def one_by_one(
    values: tuple[torch.Tensor, ...], scales: list[torch.Tensor], states: torch.Tensor, routing: Routing
) -> torch.Tensor:
    gate, up, down = (value * scale.view(EXPERTS, -1, 1) for value, scale in zip(values, scales, strict=True))
    total = torch.zeros_like(states)
    for token in range(TOKENS):
        for expert, weight in zip(routing.selected[token], routing.weights[token], strict=True):
            state = states[token]
            inner = torch.nn.functional.silu(gate[expert] @ state) * (up[expert] @ state)
            total[token] += weight * (down[expert] @ inner)
    return total


def test_stacked_experts_and_their_gradients_are_those_of_the_experts_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    gate, up, down = values = tuple(random(*shape) for shape in shapes)
    routing, wanted = some_routing(generator), random(TOKENS, HIDDEN)
    scales = [random(shape[0] * shape[1]).abs() for shape in shapes]
    states = random(TOKENS, HIDDEN)
    found = []
    for stacked in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (*scales, states, routing.weights)]
        *own, inputs, weights = leaves
        routed = routing._replace(weights=weights)
        if stacked:
            output = StackedExperts((gate, up, down), (own[0], own[1], own[2]))(inputs, routed)
        else:
            output = one_by_one(values, own, inputs, routed)
        (output * wanted).sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for plain, batched in zip(*found, strict=True):
        torch.testing.assert_close(batched, plain, rtol=1e-4, atol=1e-4)
        assert batched.abs().max() > 0


@torch.no_grad()
def test_stacked_copies_of_experts_compute_what_the_experts_do() -> None:
    config = open_checkpoint(NANO).config
    generator = torch.Generator().manual_seed(4)
    experts = Experts(config)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    states = torch.randn(TOKENS, config.hidden_size, generator=generator)
    logits = torch.randn(TOKENS, config.moe_num_experts, generator=generator)
    weights, selected = logits.softmax(-1).topk(config.moe_k)
    routing = Routing(selected, weights, logits.softmax(-1))
    found, wanted = StackedExperts.of(experts)(states, routing), experts(states, routing)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
