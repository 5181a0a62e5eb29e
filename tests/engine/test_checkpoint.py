"""Checkpoints are complete or not there, and no damage goes unnoticed."""

import os
import random
import resource
import shutil

import pytest
import torch
from engine.toy_tasks import Classifier, assert_same_run, toy_trainer

from eanet.engine.checkpoint import (
    Checkpoint,
    CheckpointWarning,
    DamagedCheckpointError,
    list_checkpoints,
    newest_intact,
    prune_checkpoints,
    save_checkpoint,
)
from eanet.engine.state import load_networks, network_tensors, restore_network
from eanet.errors import UserError


def save(folder, step, value=0.0):
    tensors = {"network.model": {"weight": torch.full((3, 2), value), "empty": torch.zeros(0)}}
    return save_checkpoint(folder, tensors, {"step": step, "best": None})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    tensors = {
        "a": {
            "half": torch.randn(3).bfloat16(),
            "scalar": torch.tensor(3),
            "strided": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        },
        "none": {},
    }
    path = save_checkpoint(tmp_path, tensors, {"step": 7, "value": 0.1 + 0.2})
    checkpoint = Checkpoint.open(path)
    assert checkpoint.step == 7
    assert checkpoint.state["value"] == 0.1 + 0.2
    for name, content in tensors.items():
        loaded = checkpoint.tensors(name)
        assert loaded.keys() == content.keys()
        for key, value in content.items():
            assert loaded[key].dtype == value.dtype
            assert torch.equal(loaded[key], value)


def test_pruning_keeps_the_newest_two_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
        prune_checkpoints(tmp_path, best_step=2)
    assert names(tmp_path) == ["step_000000002", "step_000000005", "step_000000006"]


def test_leftovers_of_a_crash_are_no_checkpoints(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000000001", tmp_path / ".writing_step_000000002")
    shutil.copytree(tmp_path / "step_000000001", tmp_path / ".deleting_step_000000003")
    assert newest_intact(tmp_path).step == 1
    prune_checkpoints(tmp_path, best_step=None)
    assert names(tmp_path) == ["step_000000001"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, value=1.0)
    save(tmp_path, 1, value=2.0)
    assert float(newest_intact(tmp_path).tensors("network.model")["weight"][0, 0]) == 2.0
    assert names(tmp_path) == ["step_000000001"]


@pytest.mark.faults
def test_each_flipped_byte_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    draw = random.Random(0)
    for _ in range(100):
        file = draw.choice(sorted(path.iterdir()))
        content = bytearray(file.read_bytes())
        place, mask = draw.randrange(len(content)), draw.randrange(1, 256)
        content[place] ^= mask
        file.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=file.name if place else "step_"):
            Checkpoint.open(path)
        content[place] ^= mask
        file.write_bytes(content)
    Checkpoint.open(path)


@pytest.mark.faults
def test_each_truncation_falls_back_to_the_one_before(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    draw = random.Random(0)
    for _ in range(50):
        file = draw.choice(sorted(path.iterdir()))
        content = file.read_bytes()
        file.write_bytes(content[: draw.randrange(len(content))])
        with pytest.warns(CheckpointWarning, match=f"{file.name}.*going on from step_000000001"):
            assert newest_intact(tmp_path).step == 1
        file.write_bytes(content)
    assert newest_intact(tmp_path).step == 2


@pytest.mark.faults
def test_a_missing_file_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(DamagedCheckpointError, match=f"{file.name}: No such file"):
            Checkpoint.open(path)
        file.write_bytes(content)


@pytest.mark.faults
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(tmp_path):
    toy_trainer(tmp_path / "whole").fit()
    toy_trainer(tmp_path / "hurt").fit()
    newest = list_checkpoints(tmp_path / "hurt" / "checkpoints")[0]
    (newest / "state.json").write_text("{}", encoding="utf-8")
    with pytest.warns(CheckpointWarning, match="state.json is damaged"):
        toy_trainer(tmp_path / "hurt").fit()
    assert (newest.parent / f"damaged_{newest.name}").is_dir()
    assert_same_run(tmp_path / "hurt", tmp_path / "whole")


@pytest.mark.faults
def test_no_intact_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
    toy_trainer(tmp_path).fit()
    for path in list_checkpoints(tmp_path / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint .* is intact: .*manifest.json"):
        toy_trainer(tmp_path).fit()


@pytest.mark.faults
def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path):
    """A limit on the size of files stands for the end of the disk; it fails in the same calls."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step_000000002 \(0.4 MB\).*: step_000000001"):
            save_checkpoint(tmp_path, {"big": {"weight": torch.zeros(100_000)}}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step_000000001"]
    assert newest_intact(tmp_path).step == 1


@pytest.mark.faults
def test_a_forbidden_folder_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=r"step_000000002 .*Permission denied"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert newest_intact(tmp_path).step == 1


def test_a_tied_parameter_is_saved_once_and_stays_tied(tmp_path):
    network = Classifier(tied=True)
    tensors = network_tensors(network)
    assert "blocks.1.linear.weight" not in tensors
    assert "blocks.0.linear.weight" in tensors
    save_checkpoint(tmp_path, {"network.model": tensors}, {"step": 1})
    other = Classifier(tied=True)
    restore_network(other, newest_intact(tmp_path).tensors("network.model"), source=tmp_path)
    assert other.blocks[0].linear.weight is other.blocks[1].linear.weight
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_a_view_into_another_tensor_is_saved_whole(tmp_path):
    network = torch.nn.Module()
    network.register_buffer("base", torch.arange(6.0))
    network.register_buffer("part", network.base[2:4])
    save_checkpoint(tmp_path, {"n": network_tensors(network)}, {"step": 1})
    assert newest_intact(tmp_path).tensors("n")["part"].tolist() == [2.0, 3.0]


def test_another_network_is_refused_with_the_first_differences(tmp_path):
    toy_trainer(tmp_path, options={"width": 8}).fit()
    with pytest.raises(UserError, match=r"another network: stem.weight has shape \(8, 6\)"):
        toy_trainer(tmp_path, options={"width": 9}).fit()
    with pytest.raises(UserError, match=r"blocks.2.linear.weight is missing"):
        load_networks(tmp_path, {"model": Classifier(depth=3)})
    with pytest.raises(UserError, match=r"networks are .'model'., not .'critic'."):
        load_networks(tmp_path, {"critic": Classifier()})


def test_loading_best_last_raw_and_averaged(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.fit()
    best = trainer.state.best["step"]
    network = Classifier()
    key = "stem.weight"
    found = load_networks(tmp_path, {"model": network}, which="last", weights="raw")
    assert found["step"] == 12
    assert torch.equal(network.state_dict()[key], trainer.networks["model"].state_dict()[key])
    found = load_networks(tmp_path, {"model": network}, which="last")
    assert found["weights"] == "ema"
    assert torch.equal(network.state_dict()[key], trainer.averages.weights["model"][key])
    assert load_networks(tmp_path, {"model": network})["step"] == best


def test_loading_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_networks(tmp_path, {"model": Classifier()})
    toy_trainer(tmp_path, ema_decay=0.0).fit()
    assert load_networks(tmp_path, {"model": Classifier()})["weights"] == "raw"
    with pytest.raises(UserError, match="no averaged weights"):
        load_networks(tmp_path, {"model": Classifier()}, weights="ema")


def test_nothing_is_pickled(tmp_path):
    toy_trainer(tmp_path).fit()
    suffixes = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_every_file_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_rename(self, target):
        events.append(f"rename {target.name}")
        rename(self, target)
        return target

    monkeypatch.setattr("os.fsync", noting_fsync)
    monkeypatch.setattr("pathlib.Path.rename", noting_rename)
    path = save(tmp_path, 1)
    place = events.index("rename step_000000001")
    assert set(events[:place]) == {file.name for file in path.iterdir()} | {
        ".writing_step_000000001"
    }
    assert events[place + 1 :] == [tmp_path.name]
