"""The notebooks run from top to bottom, are stored without outputs, and need the public API only."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import ernieq

nbclient = pytest.importorskip("nbclient", reason="the notebooks need the dev extra")
nbformat = pytest.importorskip("nbformat", reason="the notebooks need the dev extra")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_NOTEBOOK = 40_000  # bytes; a picture among the outputs would take more
TIMEOUT = 300  # seconds a cell, on a machine that is busy with other things

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a kernel that is the interpreter of this test; nothing need be installed for it."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}), encoding="utf-8"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    # The rest keeps the user's own settings and the screen out, and two processes from fighting for two cores.
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return "python3"


def copied(path: Path, project: Path) -> Path:
    """A copy of a notebook in a project with nothing but others' points and an empty folder of results."""
    (project / "notebooks").mkdir(parents=True)
    (project / "benchmarks" / "results").mkdir(parents=True)
    shutil.copy(RESULTS.parent / "peers.json", project / "benchmarks")
    return Path(shutil.copy(path, project / "notebooks"))


def executed(path: Path, kernel_name: str, *, before: str | None = None) -> str:
    """Run a notebook where it lies, up to the cell that holds ``before``; what it printed.

    Raises:
        CellExecutionError: of nbclient; a cell raised, and its traceback is the message.
    """
    notebook = nbformat.read(path, as_version=4)
    if before is not None:
        holds = [before in cell.source for cell in notebook.cells]
        notebook.cells = notebook.cells[: holds.index(True)]
    resources = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name=kernel_name, resources=resources)
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def imports(notebook: Any) -> list[tuple[str, str | None]]:
    """Module and name of everything that a notebook imports from ernieq; no name for a plain import."""
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == ernieq.__name__]


def is_public(module_name: str, name: str | None) -> bool:
    """Whether a package exports a name; without ``__all__``, whether the name is the module's own."""
    if any(part.startswith("_") for part in [*module_name.split("."), name or ""]):
        return False
    module = importlib.import_module(module_name)
    # Packages, and the modules at the top; a module inside a package is that package's own business.
    if not hasattr(module, "__path__") and module_name.count(".") > 1:
        return False
    if name is None:
        return True
    exported = getattr(module, "__all__", None)
    if exported is not None:
        return name in exported
    return getattr(getattr(module, name, None), "__module__", None) == module_name


def test_there_are_three_notebooks() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@every_notebook
def test_notebook_is_stored_valid_small_and_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert path.stat().st_size < LARGEST_NOTEBOOK


@every_notebook
def test_notebook_imports_public_names_only(path: Path) -> None:
    found = imports(nbformat.read(path, as_version=4))
    assert found != []
    assert [pair for pair in found if not is_public(*pair)] == []


def test_private_and_inner_names_are_told_from_public_ones() -> None:
    assert is_public("ernieq.trellis", "TrellisCode")
    assert is_public("ernieq.kernels.viterbi", "encode_tiles")
    assert not is_public("ernieq.encode.scales", "CODEBOOK_SCALE")
    assert not is_public("ernieq.encode", "encode_ldlq")
    assert not is_public("ernieq.kernels._native", "viterbi_encode")
    assert not is_public("ernieq.kernels.viterbi", "resolve_backend")


@every_notebook
def test_notebook_runs_without_an_error(path: Path, tmp_path: Path, kernel: str) -> None:
    copy = copied(path, tmp_path / "project")
    shutil.copytree(RESULTS, copy.parent.parent / "benchmarks" / "results", dirs_exist_ok=True)
    executed(copy, kernel)


def test_results_that_are_missing_are_told_in_a_sentence(tmp_path: Path, kernel: str) -> None:
    copy = copied(NOTEBOOKS[2], tmp_path / "project")
    printed = executed(copy, kernel, before="Conversion(")
    assert "no results" in printed
    assert "own points on mini are not in this checkout" in printed


def test_results_that_are_there_are_printed_with_their_figures(tmp_path: Path, kernel: str) -> None:
    copy = copied(NOTEBOOKS[2], tmp_path / "project")
    row = {
        "model": "ernieq-mini",
        "setting": "2 bits",
        "text": "wikitext2",
        "kl": 0.1234,
        "ratio": 1.0567,
        "top1": 0.789,
        "decoder_bytes": 12_300_000,
        "file_bytes": 22_000_000,
    }
    results = copy.parent.parent / "benchmarks" / "results"
    (results / "mini_quality.json").write_text(json.dumps({"rows": [row]}), encoding="utf-8")
    printed = executed(copy, kernel, before="Conversion(")
    assert "mini_quality: 1 rows" in printed
    assert "KL 0.1234   perplexity x 1.057   top-1 0.789   decoder 12.3 MB   file 22.0 MB" in printed


def test_a_curve_that_is_there_is_drawn_and_told_as_shares_of_the_others(tmp_path: Path, kernel: str) -> None:
    copy = copied(NOTEBOOKS[2], tmp_path / "project")
    figures = {"kl": 0.1234, "kl_noise": 0.0001, "ratio": 1.0567, "top1": 0.789, "preset": "best"}
    row = {**figures, "model": "ernieq-mini", "decoder_bytes": 12_300_000, "file_bytes": 22_000_000}
    points = [("sweep", "2.25", {}), ("EXL3", "2.0 -hq", {"share_of_peer": 0.75})]
    points.append(("llama.cpp", "Q2_K", {"share_of_peer": 0.456}))
    rows = [
        {**row, **share, "tool": tool, "setting": setting, "text": text}
        for tool, setting, share in points
        for text in ("wikitext2", "english_books")
    ]
    results = copy.parent.parent / "benchmarks" / "results"
    (results / "mini_curve.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    printed = " ".join(executed(copy, kernel, before="Conversion(").split())
    assert "best 2.25 english_books KL 0.1234 perplexity x 1.057 top-1 0.789" in printed
    assert "EXL3 2.0 -hq best wikitext2 0.75 english_books 0.75" in printed
    assert "llama.cpp Q2_K best wikitext2 0.46 english_books 0.46" in printed
