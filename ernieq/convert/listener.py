"""What a conversion tells while it works, and what it says at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ernieq.convert.distill import TuningReport
from ernieq.convert.groups import LayerReport, full_name
from ernieq.convert.plan import Plan
from ernieq.convert.workplace import Workplace
from ernieq.kernels.backend import processor_name
from ernieq.pack import CalibrationRecord, Manifest


@dataclass(frozen=True)
class Listener:
    """What a conversion tells while it works.

    Args:
        on_phase: a sentence when something new begins, or GPU memory has run out and batches become smaller.
        on_weights: weights encoded since the last call.
        on_layer: report of a finished layer.
        on_tuning_step: steps of tuning that are done, and steps in all.
        on_line: a sentence for the user: what an earlier run has left, what is damaged.
    """

    on_phase: Callable[[str], None] = lambda _: None
    on_weights: Callable[[int], None] = lambda _: None
    on_layer: Callable[[LayerReport], None] = lambda _: None
    on_tuning_step: Callable[[int, int], None] = lambda *_: None
    on_line: Callable[[str], None] = lambda _: None


@dataclass
class ConversionReport:
    """What a conversion did; ``untuned`` says why scales and norms were not tuned although they should."""

    plan: Plan
    calibration: CalibrationRecord
    layers: list[LayerReport] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    tuning: TuningReport | None = None
    untuned: str = ""

    def add(self, layer: LayerReport) -> None:
        """Add a finished layer."""
        self.layers.append(layer)
        self.errors |= {full_name(layer.index, name): error for name, error in layer.errors.items()}

    @classmethod
    def from_manifest(cls, plan: Plan, manifest: Manifest) -> ConversionReport:
        """The report of a conversion that is finished, from what its manifest keeps of it."""
        assert manifest.calibration is not None, "a conversion has calibrated"
        facts = manifest.report
        report = cls(plan, manifest.calibration, errors=dict(facts["proxy_errors"]))
        for layer in facts["layers"]:
            prefix = full_name(layer["index"], "")
            own = {name: error for name, error in report.errors.items() if name.startswith(prefix)}
            errors = {name.removeprefix(prefix): error for name, error in own.items()}
            report.layers.append(LayerReport(**layer, errors=errors))
        if facts["tuning"] is not None:
            report.tuning = TuningReport(**facts["tuning"])
        return report

    def to_json(self, workplace: Workplace, seconds: float) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {
            "seconds": round(seconds, 1),
            "device": workplace.name,
            "search_arithmetic": workplace.search_arithmetic,
            "vram_bytes": workplace.vram_bytes,  # decides how much is done at a time
            "torch": str(torch.__version__),
            "processor": processor_name(),
            "proxy_errors": {name: float(np.float32(error)) for name, error in self.errors.items()},
            "layers": [
                {
                    "index": layer.index,
                    "output_error": layer.output_error,
                    "expert_tokens": layer.expert_tokens,
                    "expert_trust": layer.expert_trust,
                }
                for layer in self.layers
            ],
            "tuning": None if self.tuning is None else dataclasses.asdict(self.tuning),
        }
