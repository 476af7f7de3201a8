"""How much every error of the weights costs: KL between the model and copies of it with emulated errors.

The bf16 model runs over a few windows, one layer in memory at a time. Beside its hidden states run those of
perturbed copies, as differences from them; a copy begins where its first error is, so an error in one unit is
paid for by the layers behind it alone. Differences are kept in bfloat16: its rounding is relative to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ernieq.calibrate import Streams, collect_layer, narrow_layer, shared_copy, stream_dtype
from ernieq.checkpoint import Checkpoint, load_embedding, load_final_norm, load_head
from ernieq.convert.collect import head_gram
from ernieq.convert.groups import EMBEDDING, HEAD, full_name, linear_of
from ernieq.convert.overlap import read_layers
from ernieq.convert.probe import Probe
from ernieq.convert.recipe import Recipe
from ernieq.convert.stored import StoredGroup
from ernieq.convert.units import Unit
from ernieq.convert.workplace import Workplace
from ernieq.encode import emulated_errors, input_signs
from ernieq.errors import NonFiniteError
from ernieq.kernels.precision import float32_products
from ernieq.model import DecoderLayer, Rotary

DIFFERENCE_DTYPE = torch.bfloat16
_CHUNK_TOKENS = 256  # whose logits are there at a time

# One copy of the model: unit name -> mean squared error per unit variance of its code.
Perturbation = Mapping[str, float]


@dataclass
class _Copy:
    """A perturbed copy: its errors, and how far its hidden states are from the model's."""

    errors: Perturbation
    difference: Tensor | None = None  # (windows, length, hidden), in the processor's memory

    def touches(self, units: Sequence[Unit]) -> list[Unit]:
        return [unit for unit in units if self.errors.get(unit.name, 0.0) > 0]


class Perturbed:
    """Measures what emulated errors cost.

    Args:
        checkpoint: the model.
        units: what errors are named after.
        recipe: damping, shrinkage and seed.
        workplace: the device that does the work.
        on_layer: called with layers done and layers in all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        units: Sequence[Unit],
        recipe: Recipe,
        workplace: Workplace,
        on_layer: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._checkpoint = checkpoint
        self._units = units
        self._recipe = recipe
        self._workplace = workplace
        self._on_layer = on_layer

    @torch.no_grad()
    def divergences(self, probe: Probe, perturbations: Sequence[Perturbation]) -> NDArray[np.float64]:
        """Mean KL(model || copy) over the tokens of every scored window, nats: (copies, windows) float64.

        Raises:
            NonFiniteError: an activation or a logit is NaN or infinite.
            CheckpointError: a tensor is malformed.
            BackendUnavailableError: the GPU has too little memory.
        """
        copies = [_Copy(errors) for errors in perturbations]
        with (
            self._workplace.limited(),
            float32_products(self._workplace.device, tensor_cores=False),
        ):
            base, seen = self._embed(probe, copies)
            base = self._layers(base, seen, copies)
            return self._compare(base, seen, copies)

    def _embed(self, probe: Probe, copies: Sequence[_Copy]) -> tuple[Tensor, Streams]:
        """Hidden states before the first layer: of the scored tokens, and streams of the seen ones."""
        table = load_embedding(self._checkpoint).weight.data
        base = nn.functional.embedding(probe.scored, table)
        if touched := self._touching(copies, EMBEDDING):
            error = self._outer_error(EMBEDDING, table, None)
            looked_up = nn.functional.embedding(probe.scored, error)
            for copy, squared in touched:
                copy.difference = (sqrt(squared) * looked_up).to(DIFFERENCE_DTYPE)
        hidden = nn.functional.embedding(probe.seen, table).to(stream_dtype(probe.seen.numel(), table.shape[1]))
        return base.to(self._workplace.device), self._workplace.place(Streams(hidden, hidden.clone()))

    def _layers(self, base: Tensor, seen: Streams, copies: Sequence[_Copy]) -> Tensor:
        """Move all states behind the last layer; returns the base's."""
        config, place = self._checkpoint.config, self._workplace
        angles = Rotary(config).angles(torch.arange(max(base.shape[1], seen.shape[1])))
        cosine, sine = (angle.to(place.device) for angle in angles)
        scored_rotary = cosine[: base.shape[1]], sine[: base.shape[1]]
        seen_rotary = cosine[: seen.shape[1]], sine[: seen.shape[1]]
        batches = place.expert_batches(config, seen.shape[0] * seen.shape[1], lambda _: None)
        shrinkage = self._recipe.encode.shrinkage
        for index, layer in enumerate(read_layers(self._checkpoint, place.device)):
            if place.is_gpu:
                narrow_layer(layer, place.device)
            grams = collect_layer(config, index, layer, seen, seen_rotary, shrinkage, batches.run).grams
            behind = _forward(layer, base, scored_rotary)
            units = [unit for unit in self._units if unit.layer == index]
            for copy in copies:
                touched = copy.touches(units)
                if copy.difference is None and not touched:
                    continue
                before = base if copy.difference is None else base + copy.difference.to(base.device)
                changed = self._perturbed(layer, index, touched, copy.errors, grams) if touched else layer
                difference = _forward(changed, before, scored_rotary).sub_(behind)
                copy.difference = difference.to(DIFFERENCE_DTYPE).cpu()
                del changed
            base = behind
            del layer, grams
            self._on_layer(index + 1, config.num_hidden_layers)
        return base

    def _perturbed(
        self,
        layer: DecoderLayer,
        index: int,
        units: Sequence[Unit],
        errors: Perturbation,
        grams: Mapping[str, Tensor],
    ) -> DecoderLayer:
        """The layer with errors in some units; the other weights are shared with it."""
        changed = shared_copy(layer)
        dtype = torch.float16 if self._workplace.is_gpu else torch.float32
        for unit in units:
            size = sqrt(errors[unit.name])
            for group in unit.groups:
                weights = {name: linear_of(layer, name).weight.data for name in group.names}
                found = self._errors(index, group, weights, grams[group.gram])
                for name, weight in weights.items():
                    linear_of(changed, name).weight.data = found[name].mul_(size).add_(weight).to(dtype)
        return changed

    def _errors(
        self, layer: int | None, group: StoredGroup, weights: Mapping[str, Tensor], gram: Tensor | None
    ) -> dict[str, Tensor]:
        """Errors of one group by name within the layer, drawn by their full names."""
        width = next(iter(weights.values())).shape[1]
        signs = input_signs(self._recipe.seed, full_name(layer, group.signs), width)
        named = {full_name(layer, name): weight for name, weight in weights.items()}
        gram = None if gram is None else gram.to(self._workplace.device)
        found = emulated_errors(named, gram, signs, self._recipe.encode.damping, self._recipe.seed)
        return dict(zip(weights, found.values(), strict=True))

    def _outer_error(self, module: str, weight: Tensor, gram: Tensor | None) -> Tensor:
        unit = next(unit for unit in self._units if module in unit.modules)
        return self._errors(None, unit.groups[0], {module: weight}, gram)[module]

    def _touching(self, copies: Sequence[_Copy], module: str) -> list[tuple[_Copy, float]]:
        """Copies with an error in a module outside the layers, and its size."""
        units = [unit for unit in self._units if module in unit.modules]
        return [(copy, copy.errors[unit.name]) for copy in copies for unit in copy.touches(units)]

    def _compare(self, base: Tensor, seen: Streams, copies: Sequence[_Copy]) -> NDArray[np.float64]:
        """KL of every copy and window, from the states behind the last layer."""
        device, config = self._workplace.device, self._checkpoint.config
        norm = load_final_norm(self._checkpoint).to(device)
        head = load_head(self._checkpoint).to(device)
        tied = config.tie_word_embeddings
        outer = EMBEDDING if tied else HEAD
        touched = self._touching(copies, outer)
        error = None
        if touched:
            gram = None if tied else head_gram(norm, seen, seen.reference)
            error = self._outer_error(outer, head.weight.data, gram)
        sizes = {id(copy): sqrt(squared) for copy, squared in touched}
        windows, length, _ = base.shape
        sums = np.zeros((len(copies), windows))
        for window, start in product(range(windows), range(0, length, _CHUNK_TOKENS)):
            rows = slice(start, start + _CHUNK_TOKENS)
            wanted = torch.log_softmax(head(norm(base[window, rows])), dim=1)  # (tokens, vocabulary)
            chances = wanted.exp()
            for place, copy in enumerate(copies):
                states = base[window, rows]
                if copy.difference is not None:
                    states = states + copy.difference[window, rows].to(device)
                normed = norm(states)
                logits = head(normed)
                if error is not None and id(copy) in sizes:
                    logits.addmm_(normed, error.T, alpha=sizes[id(copy)])
                difference = torch.log_softmax(logits, dim=1).neg_().add_(wanted)
                sums[place, window] += float(torch.linalg.vecdot(chances, difference).sum(dtype=torch.float64))
        if not np.isfinite(sums).all():
            raise NonFiniteError("logits of the model, or of a copy with small errors, are NaN or infinite")
        return sums / length


def _forward(layer: DecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a layer to (windows, length, hidden_size), a few thousand tokens at a time."""
    states = Streams(hidden, hidden)
    return torch.cat([layer(hidden[batch], rotary) for batch in states.batches()])
