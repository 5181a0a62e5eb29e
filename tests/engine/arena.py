"""Starts toy runs in processes of their own, kills them, and starts them again.

``python -m engine.arena`` reads runs from standard input, a JSON object a line, and answers each
with a line. Torch is imported once, then every process of a run is forked from here, so that a
start takes milliseconds. Nothing is computed in this process.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from engine.toy_tasks import toy_trainer

from eanet.engine.distributed import join_processes
from eanet.engine.interruption import Interrupted


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def child(trainer, rank, world_size, port):
    """Train in a forked process; never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        if world_size > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        with join_processes("cpu") as processes:
            toy_trainer(processes=processes, **trainer).fit()
        code = 0
    except Interrupted as interrupted:
        code = interrupted.exit_code
    except BaseException as error:
        print(  # noqa: T201
            f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True
        )
    finally:
        os._exit(code)


def start(trainer, world_size):
    port = free_port()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            child(trainer, rank, world_size, port)
        pids.append(pid)
    return pids


def wait_until(moment, folder, pid):
    """Wait for a moment of a run, or its end.

    Args:
        moment: ``writing`` a checkpoint, or ``training`` for some steps.
        folder: of the run.
        pid: of its main process.
    """
    checkpoints, log = Path(folder) / "checkpoints", Path(folder) / "metrics.jsonl"
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if moment == "writing":
            came = checkpoints.is_dir() and any(
                entry.name.startswith(".writing") for entry in os.scandir(checkpoints)
            )
        else:
            came = log.exists() and log.stat().st_size > 0
        if came:
            return
        time.sleep(0.0005)


def attempt(run, kill):
    """Start a run, strike it as told, and return the exit codes of its processes."""
    pids = start(run["trainer"], run.get("world_size", 1))
    if kill is not None:
        if "once" in kill:
            wait_until(kill["once"], run["trainer"]["folder"], pids[0])
        time.sleep(kill["after"])
        victims = pids if kill.get("all", True) else pids[-1:]
        for pid in victims:
            os.kill(pid, kill.get("signal", signal.SIGKILL))
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main():
    for line in sys.stdin:
        run = json.loads(line)
        codes, seconds = [], []
        for kill in [*run.get("kills", []), *([] if run.get("unfinished") else [None])]:
            begin = time.monotonic()
            codes.append(attempt(run, kill))
            seconds.append(time.monotonic() - begin)
        print(json.dumps({"codes": codes, "seconds": seconds}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
