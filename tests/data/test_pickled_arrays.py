"""Pickles read without unpickling: plain values come back, everything else is refused."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from eanet.data.pickled_arrays import read_pickled_dictionary
from eanet.errors import UserError


def plain_values():
    return {
        "data": np.arange(24, dtype=np.uint8).reshape(4, 6),
        "wide": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "labels": [3, 0, 255, 70000, -5, 2**40],
        "names": ["a.png", "\u00e9.png"],
        "nested": {"flag": True, "nothing": None, "pair": (1, 2.5), "bytes": b"\x00\xff"},
        "again": [],
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(protocol, tmp_path):
    values = plain_values()
    values["again"] = values["labels"]  # the same object twice: kept in the pickle's memory
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(values, protocol))
    found = read_pickled_dictionary(path)
    assert found.keys() == values.keys()
    for name in ("data", "wide"):
        np.testing.assert_array_equal(found[name], values[name])
        assert found[name].dtype == values[name].dtype
    assert found["labels"] == found["again"] == values["labels"]
    assert found["names"] == values["names"]
    assert found["nested"] == values["nested"]


def test_the_file_of_python_2(tmp_path):
    """As cPickle of Python 2 wrote the batches: byte strings everywhere, protocol 2."""
    pixels = bytes(range(12))
    parts = [
        pickle.PROTO + b"\x02",
        pickle.EMPTY_DICT + b"q\x01(",
        b"U\x04data" + b"q\x02",
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03",
        b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05",
        b"(K\x01K\x02K\x06\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07",
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
        b"U\x0c" + pixels + b"tb",
        b"U\x06labels]q\x08(K\x09K\x01e",
        b"U\x0bbatch_labelU\x15training batch 1 of 5",
        b"u.",
    ]
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"".join(parts))
    found = read_pickled_dictionary(path)
    assert found["labels"] == [9, 1]
    assert found["batch_label"] == "training batch 1 of 5"
    np.testing.assert_array_equal(found["data"], np.arange(12, dtype=np.uint8).reshape(2, 6))
    # what was written by hand is a pickle: Python reads the same
    assert pickle.loads(path.read_bytes(), encoding="latin1")["labels"] == [9, 1]


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        Runs(os.system, "touch ran"),
        Runs(exec, "open('ran', 'w')"),
        Runs(np.frombuffer, b"1"),
        np.array([Runs(os.system, "touch ran")], dtype=object),
        range(3),
        {1, 2},
    ],
    ids=["system", "exec", "numpy function", "object array", "range", "set"],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_is_run_or_imported(value, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": value}, protocol))
    with pytest.raises(UserError, match=r"'batch': not read: it .*; only plain values"):
        read_pickled_dictionary("batch")
    assert [path.name for path in tmp_path.iterdir()] == ["batch"]


def test_damage_is_named(tmp_path):
    path, content = tmp_path / "batch", pickle.dumps(plain_values(), 4)
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="batch"):
            read_pickled_dictionary(path)
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.integers(len(damaged))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_pickled_dictionary(path)
        except UserError as error:
            assert "batch" in str(error)  # noqa: PT017 (some bytes may change unnoticed)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="holds no dictionary"):
        read_pickled_dictionary(path)
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        read_pickled_dictionary(tmp_path / "none")


def test_every_step_is_one_of_the_format():
    from eanet.data import pickled_arrays

    known = {opcode.name for opcode in pickletools.opcodes}
    mine = {*pickled_arrays._CONSTANTS, *pickled_arrays._VALUES, *pickled_arrays._ACTIONS}
    assert mine <= known
    assert not mine & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "PERSID", "BINPERSID"}
