"""Runs in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The networks are too small to share among threads, which would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _arena_process(tmp_path_factory):
    errors = tmp_path_factory.mktemp("arena") / "stderr.txt"
    with (
        errors.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "engine.arena"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
        ) as process,
    ):
        yield process, errors
        process.stdin.close()


@pytest.fixture
def arena(_arena_process):
    """Return a function that carries out runs as ``arena.py`` describes them."""
    process, errors = _arena_process
    before = errors.stat().st_size

    def carry_out(*runs):
        reports = []
        for run in runs:
            process.stdin.write(json.dumps(run, default=str) + "\n")
            process.stdin.flush()
            reports.append(json.loads(process.stdout.readline()))
            reports[-1]["stderr"] = errors.read_text(encoding="utf-8")[before:]
        return reports

    return carry_out
