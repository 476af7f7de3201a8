"""The tables and pictures of docs/ agree with the results and the script that they come from."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ernieq.convert import default_recipe, make_plan
from ernieq.records import format_bytes
from tests.documents import README, ROOT, pictures

BENCHMARKS = ROOT / "benchmarks"
PLANNED = BENCHMARKS / "results" / "plan_sizes.json"
PEERS = BENCHMARKS / "peers.json"
FIGURES = ROOT / "docs" / "figures"
LARGEST_FIGURE = 40_000  # bytes; text that became outlines would take more
MOST_DRIFT = 0.02  # of a length on the page; another processor may sum in another order


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """A script of benchmarks/, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("matplotlib", reason="the pictures need the dev extra")
    return importlib.import_module(request.param)


def planned() -> dict[str, dict[str, Any]]:
    rows = json.loads(PLANNED.read_text(encoding="utf-8"))["rows"]
    return {f"{row['bits']:g}": row for row in rows}


@pytest.mark.parametrize("script", ["plan_sizes"], indirect=True)
@pytest.mark.parametrize("bits", [1.5, 2, 4])
def test_the_stored_plan_of_the_21b_is_what_is_planned_now(
    script: ModuleType, bits: float, tmp_path: Path
) -> None:
    checkpoint = script.write_hollow(tmp_path / "hollow")
    plan, row = make_plan(checkpoint, default_recipe(bits)), planned()[f"{bits:g}"]
    checkpoint.close()
    assert plan.parameters == 21_825_437_888
    assert (plan.output_bytes, plan.decoder_bytes) == (row["file_bytes"], row["decoder_bytes"])
    assert plan.memory_bytes == row["conversion_memory_bytes"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "howto").glob("*.md")), ids=lambda page: page.stem)
def test_sizes_in_the_tables_of_the_21b_are_those_of_the_stored_plan(page: Path) -> None:
    told = re.findall(r"^\| ([\d.]+) \| (.*) \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert told
    for bits, cells in told:
        row = planned()[bits]
        sizes = [row["file_bytes"], *row["gpu_bytes"].values()]
        if page.stem == "cpu":
            sizes = [row["file_bytes"], row["conversion_memory_bytes"]]
        assert cells.split(" | ") == [format_bytes(size) for size in sizes]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "comparison.md"], ids=lambda page: page.stem)
def test_the_table_of_peers_is_what_was_measured(page: Path) -> None:
    points = {
        f"{row['tool']} {row['setting']}": row
        for row in json.loads(PEERS.read_text(encoding="utf-8"))["models"]["ernieq-mini"]
    }
    text = page.read_text(encoding="utf-8")
    told = re.findall(
        r"^\| ((?:EXL3|llama\.cpp) [^|]+) \| ([\d.]+) MB of (\w+) \| (.*) \|$", text, re.MULTILINE
    )
    assert {name for name, *_ in told} == set(points)
    for name, megabytes, counted, cells in told:
        peer, ours = points[name], measured(name)
        assert float(megabytes) == peer[f"{counted}_mb"]
        theirs, own, shares = (tuple(map(float, cell.split(" / "))) for cell in cells.split(" | "))
        assert theirs == (peer["wikitext2"], peer["english_books"])
        for shown, row in zip(own, ours, strict=True):
            assert shown == pytest.approx(row["kl"], rel=5e-3, abs=5e-5)
        for shown, row in zip(shares, ours, strict=True):
            assert shown == pytest.approx(row["share_of_peer"], abs=5.1e-3)


def measured(peer: str) -> list[dict[str, Any]]:
    """Our rows at a peer's size: wikitext2, then english_books."""
    rows = json.loads((BENCHMARKS / "results" / "mini_curve.json").read_text(encoding="utf-8"))["rows"]
    chosen = [row for row in rows if row["preset"] == "balanced" and f"{row['tool']} {row['setting']}" == peer]
    return [row for text in ("wikitext2", "english_books") for row in chosen if row["text"] == text]


@pytest.mark.parametrize("script", ["draw_figures"], indirect=True)
def test_every_picture_of_the_mathematics_is_drawn_by_the_script(script: ModuleType) -> None:
    shown = {Path(target).stem for _, target in pictures(ROOT / "docs" / "mathematics.md")}
    assert shown == set(script.FIGURES) == {path.stem for path in FIGURES.glob("*.svg")}
    assert {path.name for path in FIGURES.glob("*.svg") if path.stat().st_size > LARGEST_FIGURE} == set()


@pytest.mark.parametrize("script", ["draw_figures"], indirect=True)
@pytest.mark.parametrize("name", ["ring", "codebook", "rates"])
def test_a_picture_shows_what_the_package_computes_now(
    script: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["draw_figures.py", str(tmp_path), "--only", name])
    script.main()
    drawn, kept = numbers(tmp_path / f"{name}.svg"), numbers(FIGURES / f"{name}.svg")
    assert len(drawn) == len(kept)
    assert max(abs(new - old) for new, old in zip(drawn, kept, strict=True)) < MOST_DRIFT


def numbers(picture: Path) -> list[float]:
    """All numbers of a picture, those in its words too."""
    text = re.sub(r"<metadata>.*?</metadata>", "", picture.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [float(number) for number in re.findall(r"(?<![\w#-])-?\d+\.?\d*(?![\w])", text)]
