from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import weights


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"model": t, "epoch": 3, "max_accuracy": 82.0},
        lambda t: {"state_dict": t, "meta": {"CLASSES": ("cat",)}},
        lambda t: {"state_dict": {"other": torch.ones(1)}, "model": t},
        lambda t: {"model_ema": {"other": torch.ones(1)}, "model": t},
        lambda t: {"model": {f"module.{name}": tensor for name, tensor in t.items()}},
        lambda t: {"model": t, "args": argparse.Namespace(lr=5e-4, model="biformer_small")},
    ],
    ids=["plain", "model", "state_dict", "model before state_dict", "never the EMA", "module prefix", "namespace"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_official_layouts_are_unwrapped(tmp_path: Path, tensors, wrap, zipped):
    file = tmp_path / "official.pth"
    torch.save(wrap(tensors), file, _use_new_zipfile_serialization=zipped)
    assert_same(weights.load_state_dict(file), tensors)


def test_a_parameter_comes_back_as_a_plain_tensor(tmp_path: Path):
    torch.save({"model": {"w": torch.nn.Parameter(torch.ones(3))}}, tmp_path / "p.pth")
    (loaded,) = weights.load_state_dict(tmp_path / "p.pth").values()
    assert not loaded.requires_grad


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path):
    torch.save({"module.w": torch.ones(1), "head.w": torch.ones(1)}, tmp_path / "mixed.pth")
    assert list(weights.load_state_dict(tmp_path / "mixed.pth")) == ["module.w", "head.w"]


def test_safetensors_round_trip_also_under_another_name(tmp_path: Path, tensors):
    weights.save_state_dict(tensors, tmp_path / "a.safetensors", {"license": "mit"})
    order = dict(sorted(tensors.items()))
    assert_same(dict(sorted(weights.load_state_dict(tmp_path / "a.safetensors").items())), order)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    assert_same(dict(sorted(weights.load_state_dict(tmp_path / "a.pth").items())), order)


def test_tensors_that_share_memory_can_be_written(tmp_path: Path):
    whole = torch.arange(12.0).view(3, 4)
    weights.save_state_dict({"whole": whole, "row": whole[1], "turned": whole.t()}, tmp_path / "v.safetensors")
    loaded = weights.load_state_dict(tmp_path / "v.safetensors")
    assert torch.equal(loaded["row"], whole[1]) and torch.equal(loaded["turned"], whole.t())


@pytest.fixture
def yacs_checkpoint(tmp_path: Path, tensors) -> Path:
    """A training checkpoint whose config was pickled by the real class name and state layout of yacs."""

    class CfgNode(dict):
        def __init__(self, values: dict | None = None):
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in (values or {}).items()})
            self.__dict__["__immutable__"] = False
            self.__dict__["__deprecated_keys__"] = set()

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = CfgNode  # type: ignore[attr-defined]
    sys.modules.update({"yacs": yacs, "yacs.config": config})
    try:
        file = tmp_path / "litv2.pth"
        node = CfgNode({"MODEL": {"TYPE": "lit", "LIT": {"ALPHA": 0.9, "DEPTHS": [2, 2, 6, 2]}}, "AMP": True})
        optimizer = {"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}
        torch.save({"model": tensors, "optimizer": optimizer, "config": node, "epoch": 299}, file)
    finally:
        del sys.modules["yacs.config"], sys.modules["yacs"]
    return file


def test_a_checkpoint_with_a_yacs_config_loads_without_yacs(yacs_checkpoint: Path, tensors):
    assert "yacs.config.CfgNode" in torch.serialization.get_unsafe_globals_in_checkpoint(yacs_checkpoint)
    before = set(torch.serialization.get_safe_globals())
    assert_same(weights.load_state_dict(yacs_checkpoint), tensors)
    assert "yacs" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == before, "the stand-in must not outlive the read"


class Payload:
    """What an attacker writes: unpickling calls a function of their choice."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, tensors, zipped):
    trace, file = tmp_path / "trace", tmp_path / "evil.pth"
    content = {"model": tensors, "config": Payload(f"touch {trace}")}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(weights.WeightsError, match=r"evil\.pth refers to .*system.*refused"):
        weights.load_state_dict(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short or damaged"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page or text"),
        (b'{"error": "share id was malformed"}', "web page or text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
    ],
    ids=["empty", "html", "json", "image"],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content, message):
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    with pytest.raises(weights.WeightsError, match=rf"x\.pth.*{message}"):
        weights.load_state_dict(file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0001, 0.3, 0.999])
def test_a_truncated_file_is_said_to_be_one(tmp_path: Path, tensors, suffix, kept):
    file = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save(tensors, file)
    else:
        weights.save_state_dict(tensors, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(weights.WeightsError, match="again"):
        weights.load_state_dict(file)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"model": {"depth": 3}}, {}])
def test_a_file_without_tensors_says_what_it_holds(tmp_path: Path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(weights.WeightsError, match="holds no state dict"):
        weights.load_state_dict(tmp_path / "x.pth")


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(weights.WeightsError, match="no such file"):
        weights.load_state_dict(tmp_path / "none.pth")
    with pytest.raises(weights.WeightsError, match="is a folder"):
        weights.load_state_dict(tmp_path)


def test_differences_names_every_kind():
    ours = {"a": torch.ones(2), "b": torch.ones(3), **{f"m{i}": torch.ones(1) for i in range(7)}}
    theirs = {"a": torch.ones(2), "b": torch.ones(4), "x": torch.ones(1)}
    said = weights.differences(theirs, ours)
    assert said is not None
    assert "7 missing: m0, m1, m2, m3, m4 and 2 more" in said
    assert "1 unexpected: x" in said
    assert "1 of another shape: b (4,) instead of (3,)" in said
    assert weights.differences(ours, ours) is None
