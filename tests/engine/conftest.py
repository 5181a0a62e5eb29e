"""Runs in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def arena():
    """Return a function that carries out runs as ``arena.py`` describes them."""

    def carry_out(*runs, timeout=120):
        done = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("arena.py")),
                json.dumps(runs, default=str),
            ],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        reports = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(reports) == len(runs), done.stderr
        for report in reports:
            report["stderr"] = done.stderr
        return reports

    return carry_out
