"""Files are whole or as they were, and say what they hold."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dmd_tutorial.files import header_of, write_json, write_tensors


def test_what_cannot_be_written_leaves_the_file_and_nothing_beside_it(tmp_path):
    path, x = tmp_path / "folder" / "x.safetensors", torch.arange(6.0).view(2, 3)
    write_tensors(path, {"x": x.T}, made_by=json.dumps({"seed": 3}))
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"x": x, "view": x}, made_by="{}")
    with pytest.raises(TypeError):
        write_json(path, object())
    with pytest.raises(OSError, match=r"x.safetensors/y could not be written: .*File exists"):
        write_json(path / "y", 1)
    assert torch.equal(load_file(path)["x"], x.T)
    assert header_of(path, "pairs", "made_by") == [{"seed": 3}]
    assert [*path.parent.iterdir()] == [path]
    with pytest.raises(ValueError, match="not a readable network file: 'model'"):
        header_of(path, "network", "model", "made_by")


def test_json_has_null_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "x.json", {"clip": math.inf, "rows": [math.nan, 0.5]})
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"clip": None, "rows": [None, 0.5]}
