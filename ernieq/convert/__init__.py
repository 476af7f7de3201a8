"""Conversions: the recipe, the plan, the job that quantizes a checkpoint, and the export of one."""

from ernieq.convert.collect import calibration_record, collect_statistics, draw_sample
from ernieq.convert.estimate import estimate_seconds
from ernieq.convert.groups import LayerReport
from ernieq.convert.job import Conversion, check_output
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.listener import ConversionReport, Listener
from ernieq.convert.plan import PartPlan, Plan, make_plan
from ernieq.convert.recipe import (
    BITS_ALLOWED,
    KEEP,
    CalibrationSettings,
    EncodeSettings,
    Part,
    Recipe,
    apply_overrides,
    default_recipe,
    read_recipe,
)
from ernieq.convert.stored import HessianDirectory
from ernieq.convert.workplace import Workplace

__all__ = [
    "BITS_ALLOWED",
    "KEEP",
    "CalibrationSettings",
    "Conversion",
    "ConversionReport",
    "EncodeSettings",
    "HessianDirectory",
    "LayerQuantizer",
    "LayerReport",
    "Listener",
    "Part",
    "PartPlan",
    "Plan",
    "Recipe",
    "Workplace",
    "apply_overrides",
    "calibration_record",
    "check_output",
    "collect_statistics",
    "default_recipe",
    "draw_sample",
    "estimate_seconds",
    "make_plan",
    "read_recipe",
]
