"""The routed experts of a layer, all in the trellis code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self, cast

import torch
from torch import Tensor, nn

from ernieq.decode import stack
from ernieq.decode.linear import TrellisLinear
from ernieq.decode.stack import MatrixStack
from ernieq.decode.weight import target_device
from ernieq.model import Mlp, Routing
from ernieq.trellis import TrellisCode


class TrellisExperts(nn.ModuleList):
    """Weighted sum of the experts that each token selected, in place of the model's ``Experts``.

    The gate and up matrices of all experts read the same input. Where their signs are equal, as the encoder
    makes them, a token is rotated once and not once per expert; where they differ, each matrix rotates by
    itself.

    On a GPU the experts lie behind each other in one tensor per product (``stacked``), of which the matrices of
    each expert are views, if their codes and signs are equal; else they run one after the other there, too.

    Shapes: N tokens, E experts, k experts per token, H hidden width, I width of an expert.

    Args:
        experts: one ``Mlp`` per expert, its three linears ``TrellisLinear``.
    """

    def __init__(self, experts: Iterable[Mlp]) -> None:
        super().__init__(experts)
        readers = self._readers()
        self._gate_up: MatrixStack | None = None
        self._down: MatrixStack | None = None
        first = readers[0]
        self._one_rotation = all(
            reader.rotation_block == first.rotation_block and torch.equal(reader.signs, first.signs)
            for reader in readers
        )

    def forward(self, states: Tensor, routing: Routing) -> Tensor:
        """Run each selected expert once over its own tokens.

        On the CPU the sum of a token is formed in the order of expert numbers, in float32, so that it does not
        depend on the other tokens.

        Args:
            states: (N, H).
            routing: of the same N tokens.

        Returns:
            (N, H) in the dtype of ``states``.
        """
        if self._gate_up is not None and self._down is not None:
            return self._run_stacked(self._gate_up, self._down, states, routing)
        inputs = self._rotated(states)
        total = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
        choices = routing.selected.shape[1]
        order = routing.selected.flatten().argsort(stable=True)  # (N k,) places in `selected`, expert by expert
        weights = routing.weights.float().flatten()[order, None]  # (N k, 1)
        counts = routing.selected.flatten().bincount(minlength=len(self)).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                part = slice(start, start + count)
                tokens = order[part] // choices
                output = self._run(cast(Mlp, self[expert]), inputs.index_select(0, tokens))
                total.index_add_(0, tokens, output * weights[part])
                start += count
        return total.to(states.dtype)

    def _rotated(self, states: Tensor) -> Tensor:
        states = states.float()
        first = cast(TrellisLinear, cast(Mlp, self[0]).gate_proj)
        return first.rotate(states) if self._one_rotation else states

    def _run(self, mlp: Mlp, inputs: Tensor) -> Tensor:
        gate, up = cast(TrellisLinear, mlp.gate_proj), cast(TrellisLinear, mlp.up_proj)
        down = cast(TrellisLinear, mlp.down_proj)
        if self._one_rotation:
            inner = mlp.activate(gate.forward_rotated(inputs), up.forward_rotated(inputs))
        else:
            inner = mlp.activate(gate(inputs), up(inputs))
        output: Tensor = down(inner)
        return output

    def _run_stacked(self, gate_up: MatrixStack, down: MatrixStack, states: Tensor, routing: Routing) -> Tensor:
        """On a GPU: the way that suits the number of tokens."""
        tokens, choices = routing.selected.shape
        if not tokens:
            return torch.zeros_like(states)
        if tokens <= stack.SELECTED_TOKENS:
            run = stack.run_selected
        elif tokens * choices <= stack.GROUPED_ROWS * len(self):
            run = stack.run_grouped
        else:
            run = stack.run_decoded
        inputs = states.detach().float().contiguous()
        return run(gate_up, down, inputs, routing.selected, routing.weights.float()).to(states.dtype)

    def _readers(self) -> list[TrellisLinear]:
        """The linears that read the tokens: gate and up of every expert."""
        return [cast(TrellisLinear, linear) for mlp in self for linear in (mlp.gate_proj, mlp.up_proj)]

    def move(self, device: torch.device) -> None:
        """Take the experts to a GPU, one by one, into one tensor per product where that can be."""
        downs = [cast(TrellisLinear, mlp.down_proj) for mlp in self]
        readers = self._readers()
        if not (stack.stackable(readers) and stack.stackable(downs)):
            return  # each matrix moves by itself
        pairs = list(zip(readers[::2], readers[1::2], strict=True))
        self._gate_up = stack.stack_matrices(pairs, device)
        self._down = stack.stack_matrices([(down,) for down in downs], device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply a conversion; a move to a GPU stacks the experts there first."""
        target = target_device(fn, self._readers()[0].scale.device)
        if target is not None:
            self.move(target)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def stacked(self) -> bool:
        """Whether all experts lie in one tensor per product; the attributes below exist only then."""
        return self._gate_up is not None

    @property
    def gate_up(self) -> MatrixStack:
        """Gate above up, of all experts: words (E, 2 I / 16, H / 16, 8 K), scale (E, 2 I), signs (H,)."""
        assert self._gate_up is not None, "the experts are not stacked"
        return self._gate_up

    @property
    def down(self) -> MatrixStack:
        """Down of all experts: words (E, H / 16, I / 16, 8 K), scale (E, H), signs (I,)."""
        assert self._down is not None, "the experts are not stacked"
        return self._down

    @property
    def gate_up_words(self) -> Tensor:
        """(E, 2 I / 16, H / 16, 8 K) int32."""
        return self.gate_up.words

    @property
    def gate_up_scale(self) -> Tensor:
        """(E, 2 I) float16."""
        return self.gate_up.scale

    @property
    def gate_up_signs(self) -> Tensor:
        """(H,) int8."""
        return self.gate_up.signs

    @property
    def code_gate_up(self) -> TrellisCode:
        """The code of the gate and up matrices."""
        return self.gate_up.code

    @property
    def down_words(self) -> Tensor:
        """(E, H / 16, I / 16, 8 K) int32."""
        return self.down.words

    @property
    def down_scale(self) -> Tensor:
        """(E, H) float16."""
        return self.down.scale

    @property
    def down_signs(self) -> Tensor:
        """(I,) int8."""
        return self.down.signs

    @property
    def code_down(self) -> TrellisCode:
        """The code of the down matrices."""
        return self.down.code
