"""lm-evaluation-harness scores a packed checkpoint on a task of two questions that lies on disk."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernieq.integrations.transformers import lm_eval
from tests.integrations.transformers.packed_checkpoints import write_packed

TASK = """task: tiny_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{best}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = (
    {"start": "w5 w6 w7", "ends": ["w8 w9", "w10"], "best": 0},
    {"start": "w50 w60", "ends": ["w8", "w11 w12 w13"], "best": 1},
)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: make test-transformers")
def test_the_harness_evaluates_a_packed_model(tmp_path: Path) -> None:
    write_packed(tmp_path / "packed")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_local.yaml").write_text(TASK.format(questions=tmp_path / "questions.jsonl"))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    arguments = f"--model hf --model_args pretrained={tmp_path / 'packed'},dtype=float32 --device cpu"
    arguments += f" --tasks tiny_local --include_path {tmp_path / 'tasks'} --output_path {tmp_path / 'results'}"
    done = subprocess.run(
        [sys.executable, "-m", lm_eval.__name__, *arguments.split()],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["tiny_local"]
    assert found["acc,none"] in (0.0, 0.5, 1.0)


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit, match=r"is not installed; pip install 'ernieq\[lm-eval\]' brings it"):
        lm_eval.main()
