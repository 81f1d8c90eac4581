import json
import math
from pathlib import Path

import pytest

from rgpo.errors import RgpoError
from rgpo.runs.atomic import json_bytes, nonfinite_path, temporary_path, write_atomic


def test_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    temporary_path(path).write_bytes(b"of a killed process, and longer than what follows")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_told_in_one_sentence(tmp_path):
    with pytest.raises(RgpoError, match=r"Could not write .*a\.json \(No such file"):
        write_atomic(tmp_path / "none" / "a.json", b"x")


def test_json_is_strict_and_exact():
    value = {"big": 2**127 + 1, "third": 1 / 3, "tiny": 5e-324, "path": Path("/a/b")}
    back = json.loads(json_bytes(value))
    assert back == {**value, "path": "/a/b"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"a": math.inf})
    with pytest.raises(TypeError, match="set is not JSON"):
        json_bytes({"a": {1}})


def test_nonfinite_path_names_the_place():
    assert nonfinite_path({"a": [1.0, {"b": math.nan}]}) == "a.1.b"
    assert nonfinite_path({"a": [1.0, {"b": 2}], "c": None}) is None
