"""Agreement of vLLM's CPU build, serving packed checkpoints, with our own runtime.

Packs ernieq-nano at 2 bits (v at 4.5, the downs of one layer at 2.5, a search of 12 state bits: decoding is
compared, not quality) and lets both continue the same prompts greedily in float32: compiled, with two
tensor-parallel and two expert-parallel processes, through the OpenAI-compatible server, and without the plugin.
The model as it was shows what vLLM's router does to the correction bias. It runs where vLLM is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, write_result
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import ernieq
from ernieq.bundled import bundled_model
from ernieq.cli import main as ernieq_command

RECIPE = """bits = 2
[modules]
"*.v_proj" = 4.5
"model.layers.2.mlp.experts.*.down_proj" = 2.5
[encode]
state_bits = 12
[calibration]
windows = 8
window = 512
"""
TEXTS = [
    "The old house stood",
    "She opened the letter and",
    "In the beginning the river was",
    "It rained all day. The children stayed inside and read, and the dog slept by the fire. " * 8,
]
TWO = {"tensor_parallel_size": 2}
# The test machine may have two processors only, of which vLLM would keep one for itself.
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
BIAS = "e_score_correction_bias"
SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="compare this packed directory only, and print the figures")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model:
            print(json.dumps(agreement(arguments.model, Path(folder), {"enforce_eager": True})))
            return
        figures = measure(Path(folder))
    result = {
        "machine": describe_machine(),
        "vllm": {name: version(name) for name in ("vllm-cpu", "transformers")},
        "command": "make test-vllm",
        "recipe": RECIPE.splitlines(),
        "prompt_tokens": "3 short prompts and one of more than 150, 24 new tokens each",
        **figures,
    }
    print(json.dumps(figures, indent=1))
    if arguments.out:
        write_result(arguments.out, result)


def measure(folder: Path) -> dict[str, Any]:
    """All figures."""
    plain = bundled_model("ernieq-nano")
    zeroed = without_bias(plain, folder / "zeroed")
    packed, packed_zeroed = pack(plain, folder / "packed"), pack(zeroed, folder / "packed-zeroed")
    eager = {"enforce_eager": True}
    return {
        "packed": {
            "compiled": agreement(packed, folder, {}),
            "two tensor-parallel processes": agreement(packed, folder, eager | TWO, TWO_PROCESSES),
            "two expert-parallel processes": agreement(
                packed, folder, eager | TWO | {"enable_expert_parallel": True}, TWO_PROCESSES
            ),
            "router bias zero": agreement(packed_zeroed, folder, eager),
        },
        "not packed, vLLM's own layers": {
            "router bias as trained": agreement(plain, folder, eager),
            "router bias zero": agreement(zeroed, folder, eager),
        },
        "server": served(packed, folder),
        "without the plugin": message_without_plugin(packed),
    }


def pack(source: Path, target: Path) -> Path:
    """Quantize by ``RECIPE``."""
    recipe = target.with_suffix(".toml")
    recipe.write_text(RECIPE)
    command = ["quantize", str(source), "--recipe", str(recipe), "--preset", "fast", "--out", str(target)]
    ernieq_command([*command, "--device", "cpu"], standalone_mode=False)
    return target


def without_bias(source: Path, target: Path) -> Path:
    """A copy of an ordinary checkpoint whose correction biases are zero."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    zeroed = {name: torch.zeros_like(t) if BIAS in name else t for name, t in tensors.items()}
    save_file(zeroed, target / "model.safetensors", {"format": "pt"})
    return target


def prompts_of(model: Path) -> list[list[int]]:
    """The token ids of ``TEXTS``."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.encode(text) for text in TEXTS]


def agreement(
    model: Path, folder: Path, options: dict[str, Any], settings: dict[str, str] | None = None
) -> dict[str, Any]:
    """Let vLLM continue the prompts, and compare with our logits on the same tokens."""
    prompts, out = folder / "prompts.json", folder / "out.json"
    prompts.write_text(json.dumps(prompts_of(model)))
    script = Path(__file__).with_name("vllm_generate.py")
    command = [sys.executable, str(script), str(model), str(prompts), str(out)]
    run = subprocess.run(
        [*command, "--options", json.dumps(options)],
        env=environment(**(settings or {})),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if run.returncode:
        raise RuntimeError(f"vLLM failed on {model.name} with {options}:\n{(run.stdout + run.stderr)[-4000:]}")
    return compare(model, json.loads(out.read_text()))


def compare(model: Path, sequences: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy tokens that agree, and the largest difference of a log-probability that vLLM gave."""
    ours = ernieq.load_model(model)
    same = total = 0
    largest = 0.0
    for sequence in sequences:
        with torch.no_grad():
            logprobs = ours(torch.tensor([sequence["ids"]]))[0].log_softmax(-1)
        for position in range(1, len(sequence["ids"])):
            row = logprobs[position - 1]
            given = sequence["logprobs"][position].items()
            largest = max(largest, *(abs(float(row[int(token)]) - value) for token, value in given))
            if position >= sequence["given"]:
                total += 1
                same += int(row.argmax()) == sequence["ids"][position]
    return {"greedy_tokens": total, "same": same, "largest_logprob_difference": largest}


def served(model: Path, folder: Path) -> dict[str, Any]:
    """Start vLLM's server and ask it as any OpenAI client would; our own greedy text beside its."""
    port = free_port()
    with server(model, port, folder / "server.log", {}):
        body = {"model": "nano", "prompt": TEXTS[0], "max_tokens": 24, "temperature": 0}
        answer = post(f"http://127.0.0.1:{port}/v1/completions", body)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(TEXTS[0])
    ours, given = ernieq.load_model(model), len(ids)
    for _ in range(24):
        with torch.no_grad():
            ids.append(int(ours(torch.tensor([ids]))[0, -1].argmax()))
    return {
        "request": "POST /v1/completions",
        "vllm": answer["choices"][0]["text"],
        "ernieq": tokenizer.decode(ids[given:]),
    }


@contextmanager
def server(model: Path, port: int, log: Path, settings: dict[str, str]) -> Any:
    """Run vLLM's OpenAI-compatible server until the block ends.

    It is started as a module: the command ``vllm`` of vllm-cpu 0.32.0 ends with PackageNotFoundError, because
    it asks for the version of a package ``vllm``.
    """
    options = ["--model", str(model), "--served-model-name", "nano", "--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options, "--max-model-len", "512"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment(**settings),
            stdout=file,
            stderr=file,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a server answers."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"vLLM's server did not answer:\n{log.read_text()[-4000:]}")


def post(url: str, body: dict[str, Any]) -> Any:
    """Send JSON and read JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def message_without_plugin(model: Path) -> str:
    """The line that vLLM prints for a packed checkpoint when no plugin is loaded."""
    code = f"from vllm import LLM; LLM(model={str(model)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(VLLM_PLUGINS=""),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    lines = [line.strip() for line in (run.stdout + run.stderr).splitlines() if "quantization method" in line]
    return lines[-1].split(" [type=")[0] if run.returncode and lines else ""


def environment(**settings: str) -> dict[str, str]:
    """Ours, without a hub and with a small cache for keys and values."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **settings}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
