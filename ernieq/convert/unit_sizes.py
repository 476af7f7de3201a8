"""Bytes of the units of allocation at every rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ernieq.checkpoint import Checkpoint
from ernieq.convert.plan import Plan, source_bytes
from ernieq.convert.recipe import KEEP
from ernieq.convert.sizes import header_bytes, packed_bytes, packed_header_bytes
from ernieq.convert.targets import Goal
from ernieq.convert.units import Unit


class UnitSizes:
    """Bytes of units at every rate, as the plan counts them.

    Args:
        checkpoint: the source.
        units: of the model, all of them.
        lightest: the plan with every unit at its lowest rate.
    """

    def __init__(self, checkpoint: Checkpoint, units: Sequence[Unit], lightest: Plan) -> None:
        self._checkpoint, self._units = checkpoint, units
        self._source = source_bytes(checkpoint)
        self.parameters = lightest.parameters
        rates = {unit.name: unit.rates[0] for unit in units}
        self._fixed = {
            Goal.FILE: lightest.output_bytes - self._sum(rates, Goal.FILE),
            Goal.DECODER: lightest.decoder_bytes - self._sum(rates, Goal.DECODER),
        }

    def fixed(self, goal: Goal) -> int:
        """Bytes of what no unit holds: norms, router, headers of the shards."""
        return self._fixed[Goal.DECODER if goal is Goal.DECODER else Goal.FILE]

    def of(self, unit: Unit, rate: float, goal: Goal) -> int:
        """Bytes of a unit, with its header entries where whole files are counted."""
        if goal is Goal.DECODER and unit.layer is None:
            return 0
        return sum(self._module(module, rate, data_only=goal is Goal.DECODER) for module in unit.modules)

    def total(self, rates: Mapping[str, float], goal: Goal) -> int:
        """Bytes of the file, or of the decoder layers."""
        return self.fixed(goal) + self._sum(rates, goal)

    def _sum(self, rates: Mapping[str, float], goal: Goal) -> int:
        return sum(self.of(unit, rates[unit.name], goal) for unit in self._units)

    def _module(self, module: str, rate: float, *, data_only: bool) -> int:
        info = self._checkpoint.info(f"{module}.weight")
        if rate == KEEP:
            return info.nbytes + (
                0 if data_only else header_bytes(f"{module}.weight", info.shape, self._source)
            )
        data = packed_bytes(info.shape, rate)
        return data + (0 if data_only else packed_header_bytes(module, info.shape, self._source))
