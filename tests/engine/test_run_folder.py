"""Locks, files and records of a run folder."""

import json
import os
import subprocess
import sys

import pytest

from eanet.engine.progress import Journal, MetricsLog, read_metrics_log
from eanet.engine.run_folder import RunFolder, environment, write_text
from eanet.errors import UserError

HOLD = """
import sys
from eanet.engine.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_never_share_a_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by another process .process {holder.pid} "):
            RunFolder(tmp_path).lock().__enter__()
        # a process that is killed leaves no lock behind
        holder.kill()
        holder.wait()
    with RunFolder(tmp_path).lock():
        pass


def test_two_runs_of_a_process_never_share_a_folder(tmp_path):
    folder = RunFolder(tmp_path)
    same = RunFolder(tmp_path / ".").lock()
    with (
        folder.lock(),
        folder.lock(),
        pytest.raises(UserError, match="another run of this process"),
    ):
        same.__enter__()
    with RunFolder(tmp_path).lock():
        pass


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """Loader workers may outlive a training process that was killed."""
    read, write = os.pipe()
    lock = RunFolder(tmp_path).lock()
    lock.__enter__()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    lock.__exit__(None, None, None)
    hold = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path)], input="", capture_output=True, text=True
    )
    os.write(write, b"x")
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert hold.stdout == "held\n", hold.stderr


def test_a_path_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=f"run folder {file}"):
        RunFolder(file).lock().__enter__()


def test_json_is_replaced_in_one_step(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_json(folder.metrics, {"accuracy": 1.0})
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match=r"metrics.json: No space left on device"):
        folder.write_json(folder.metrics, {"accuracy": 2.0})
    assert json.loads(folder.metrics.read_text(encoding="utf-8")) == {"accuracy": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    log = MetricsLog(folder, done=0, tensorboard=False)
    for step in (10, 20, 30):
        log.write("train", step, {"loss": float(step)})
    log.close()
    with folder.metrics_log.open("a", encoding="utf-8") as file:
        file.write('{"step": 40, "kind": "tra')  # the process died here
    assert [record["step"] for record in read_metrics_log(folder.metrics_log)] == [10, 20, 30]
    log = MetricsLog(folder, done=20, tensorboard=False)
    log.write("train", 21, {"loss": float("nan")})
    log.close()
    lines = folder.metrics_log.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 21]
    assert json.loads(lines[-1])["loss"] is None


def test_lines_tell_the_progress_without_a_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("eanet.engine.progress._LINE_EVERY_SECONDS", 0.0)
    with Journal(
        RunFolder(tmp_path), done=4, total=10, batch_size=8, tensorboard=False, quiet=False
    ) as journal:
        journal.train(5, {"loss": 0.5, "accuracy": 0.1, "lr": 0.01})
        journal.step(5)
        journal.validation(5, {"accuracy": 0.25})
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("step 5/10  ")
    assert "samples/s  loss 0.5  lr 0.01  0:00:0" in lines[0]
    assert lines[1] == "step 5/10  validation  accuracy 0.25"


def test_a_bar_tells_the_progress_on_a_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Journal(
        RunFolder(tmp_path), done=0, total=2, batch_size=8, tensorboard=False, quiet=False
    ) as journal:
        journal.train(1, {"loss": 0.5})
        journal.step(1)
        journal.say("[bold] is shown as it is")
        journal.step(2)
    shown = capfd.readouterr().err
    assert "step 2/2" in shown
    assert "samples/s" in shown
    assert "[bold] is shown as it is" in shown


def test_other_processes_are_silent(capfd):
    with Journal(None, done=0, total=2, batch_size=8, tensorboard=True, quiet=False) as journal:
        journal.train(1, {"loss": 0.5})
        journal.step(1)
        journal.validation(1, {"accuracy": 0.5})
        journal.make_durable()
        journal.say("nothing")
    assert capfd.readouterr() == ("", "")


def test_the_environment_is_json_with_versions():
    found = json.loads(json.dumps(environment()))
    assert found["libraries"]["torch"].startswith("2.")
    assert found["python"].startswith("3.")


def test_the_environment_tells_the_command_without_folders_of_this_machine(monkeypatch):
    words = [
        "/home/me/.venv/bin/eanet",
        "train",
        "a/b",
        "--out",
        "/data/runs/x/",
        "--data.root=/d/c",
    ]
    monkeypatch.setattr("sys.argv", [*words, "--optim.lr=1e-3", "/"])
    expected = ["eanet", "train", "a/b", "--out", "x", "--data.root=c", "--optim.lr=1e-3", "/"]
    assert environment()["command"] == expected


def test_a_file_in_a_missing_folder_is_an_error_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*missing/a.txt"):
        write_text(tmp_path / "missing" / "a.txt", "")
