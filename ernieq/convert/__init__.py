"""Conversions: the recipe, the plan, the job that quantizes a checkpoint, and the export of one."""

from ernieq.convert.allocation import Allocation, Allocator
from ernieq.convert.audit import audited, coverage_sentence
from ernieq.convert.collect import calibration_record, collect_statistics, draw_sample
from ernieq.convert.distill import TuningReport
from ernieq.convert.estimate import Estimate, estimate_time
from ernieq.convert.groups import LayerReport
from ernieq.convert.hessian_job import HessianJob
from ernieq.convert.identity import differences, job_identity, text_identity
from ernieq.convert.job import Conversion
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.listener import ConversionReport, Listener
from ernieq.convert.output import check_output, check_place
from ernieq.convert.pace import keep_pace, remaining_seconds
from ernieq.convert.plan import PartPlan, Plan, make_plan, sample_tokens
from ernieq.convert.preflight import audited_plan, check_preflight, staged_bytes
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
from ernieq.convert.reproduce import (
    check_arithmetic,
    check_hessians,
    check_source,
    find_texts,
    made_on_gpu,
    recorded_recipe,
    run_again,
)
from ernieq.convert.resources import check_writable
from ernieq.convert.resume import other_job
from ernieq.convert.scan import SourceScan
from ernieq.convert.shard_match import FileMatch, match_packed
from ernieq.convert.staging import ALLOCATION, Staging, staging_path
from ernieq.convert.stored import SUMMARY_NAME, HessianDirectory
from ernieq.convert.targets import Goal, Target, parse_bytes
from ernieq.convert.tune import Tuned, tune_model
from ernieq.convert.workplace import Workplace

__all__ = [
    "ALLOCATION",
    "BITS_ALLOWED",
    "KEEP",
    "PRESETS",
    "SUMMARY_NAME",
    "Allocation",
    "Allocator",
    "CalibrationSettings",
    "Conversion",
    "ConversionReport",
    "EncodeSettings",
    "Estimate",
    "FileMatch",
    "Goal",
    "HessianDirectory",
    "HessianJob",
    "LayerQuantizer",
    "LayerReport",
    "Listener",
    "Part",
    "PartPlan",
    "Plan",
    "Preset",
    "PresetName",
    "Recipe",
    "SourceScan",
    "Staging",
    "Target",
    "TuneSettings",
    "Tuned",
    "TuningReport",
    "Workplace",
    "apply_overrides",
    "audited",
    "audited_plan",
    "calibration_record",
    "check_arithmetic",
    "check_hessians",
    "check_output",
    "check_place",
    "check_preflight",
    "check_source",
    "check_writable",
    "collect_statistics",
    "coverage_sentence",
    "default_recipe",
    "differences",
    "draw_sample",
    "estimate_time",
    "find_texts",
    "job_identity",
    "keep_pace",
    "made_on_gpu",
    "make_plan",
    "match_packed",
    "other_job",
    "parse_bytes",
    "read_recipe",
    "recorded_recipe",
    "remaining_seconds",
    "run_again",
    "sample_tokens",
    "staged_bytes",
    "staging_path",
    "stated_parts",
    "text_identity",
    "tune_model",
]
