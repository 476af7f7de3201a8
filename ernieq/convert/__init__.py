"""Conversions: the recipe, the plan, the job that quantizes a checkpoint, and the export of one."""

from ernieq.convert.allocation import Allocation, Allocator
from ernieq.convert.collect import calibration_record, collect_statistics, draw_sample
from ernieq.convert.distill import TuningReport
from ernieq.convert.estimate import estimate_seconds
from ernieq.convert.groups import LayerReport
from ernieq.convert.identity import differences, job_identity, text_identity
from ernieq.convert.job import Conversion
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.listener import ConversionReport, Listener
from ernieq.convert.output import check_output, check_place
from ernieq.convert.plan import PartPlan, Plan, make_plan
from ernieq.convert.presets import PRESETS, Preset, PresetName
from ernieq.convert.recipe import (
    BITS_ALLOWED,
    KEEP,
    CalibrationSettings,
    EncodeSettings,
    Part,
    Recipe,
    TuneSettings,
    apply_overrides,
    default_recipe,
    read_recipe,
    stated_parts,
)
from ernieq.convert.staging import ALLOCATION, Staging
from ernieq.convert.stored import HessianDirectory
from ernieq.convert.targets import Goal, Target, parse_bytes
from ernieq.convert.tune import Tuned, tune_model
from ernieq.convert.workplace import Workplace

__all__ = [
    "ALLOCATION",
    "BITS_ALLOWED",
    "KEEP",
    "PRESETS",
    "Allocation",
    "Allocator",
    "CalibrationSettings",
    "Conversion",
    "ConversionReport",
    "EncodeSettings",
    "Goal",
    "HessianDirectory",
    "LayerQuantizer",
    "LayerReport",
    "Listener",
    "Part",
    "PartPlan",
    "Plan",
    "Preset",
    "PresetName",
    "Recipe",
    "Staging",
    "Target",
    "TuneSettings",
    "Tuned",
    "TuningReport",
    "Workplace",
    "apply_overrides",
    "calibration_record",
    "check_output",
    "check_place",
    "collect_statistics",
    "default_recipe",
    "differences",
    "draw_sample",
    "estimate_seconds",
    "job_identity",
    "make_plan",
    "parse_bytes",
    "read_recipe",
    "stated_parts",
    "text_identity",
    "tune_model",
]
