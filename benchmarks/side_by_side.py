"""Commands of ``ernieq`` side by side, in processes that stay: each loads torch and compiles kernels once."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import Queue
from typing import Any


def pool(jobs: int, device: str) -> ProcessPoolExecutor:
    """Processes that share out the processors, and the GPUs unless ``device`` is the CPU.

    Args:
        jobs: number of processes.
        device: what ``--device`` will say.
    """
    context = multiprocessing.get_context("spawn")
    places: Queue[tuple[str | None, tuple[int, ...]]] = context.Queue()
    gpus = [None] if device == "cpu" else _gpus()
    cores = sorted(os.sched_getaffinity(0))
    for job in range(jobs):
        places.put((gpus[job % len(gpus)], tuple(cores[job::jobs] or cores)))
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_settle, initargs=(places,))


def run(arguments: list[str]) -> str:
    """Run ``ernieq`` in this process and return what it prints.

    Raises:
        RuntimeError: the command failed; it names the command and what it said.
    """
    from ernieq.cli import main

    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = main(arguments, standalone_mode=False) or 0
        except Exception as error:
            code = 1
            print(error, file=said)
    if code:
        raise RuntimeError(f"ernieq {' '.join(arguments)}: {said.getvalue().strip()}")
    return printed.getvalue()


def in_order(jobs: int, device: str, work: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Any]:
    """``work(*task)`` of every task, in their order; the first that fails ends all."""
    with pool(jobs, device) as executor:
        waiting = [executor.submit(work, *task) for task in tasks]
        try:
            return [task.result() for task in waiting]
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def _settle(places: Queue[tuple[str | None, tuple[int, ...]]]) -> None:
    """Take a place: a GPU, if there is one, and a share of the processors."""
    gpu, cores = places.get()
    os.sched_setaffinity(0, cores)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _gpus() -> list[str | None]:
    """Numbers of the GPUs that may be used; a None alone where there is none."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return list(visible.split(","))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [None]
    return [str(number) for number in range(len(listed.splitlines()))] or [None]
