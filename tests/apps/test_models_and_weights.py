"""`attnsuite models`, `attnsuite weights`, and weights and labels of a user's own."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from support import SAMPLES

import attnsuite  # noqa: F401 - registers our models
import weights
from apps.building import NoInitialWeights, left_blank
from apps.models import label_names


def test_models_lists_ours_with_published_figures(run):
    done = run("models", "--json")
    assert done.code == 0, done.err
    facts = {fact["name"]: fact for fact in json.loads(done.out)}
    registered = {n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("vision.")}
    assert set(facts) == registered | {"tf_efficientnet_lite0", "shapes_biformer"}
    # Parameters (M) and GMACs of the papers' tables; theirs leave some small operations out.
    published = {
        "litv2_small": (28, 3.7, 82.0),
        "litv2_medium": (49, 7.5, 83.3),
        "litv2_base": (87, 13.2, 83.6),
        "biformer_tiny": (13, 2.2, 81.4),
        "biformer_small": (26, 4.5, 83.8),
        "biformer_base": (57, 9.8, 84.3),
    }
    for name, (params, gmacs, top1) in published.items():
        assert facts[name]["params"] == pytest.approx(params, rel=0.02), name
        assert facts[name]["gmacs"] == pytest.approx(gmacs, rel=0.09), name
        assert facts[name]["top1"] == top1 and facts[name]["here"] is False
    assert facts["tf_efficientnet_lite0"]["here"] is True
    assert facts["litv2_nano"]["source"] is None


# Parameters (M) and GMACs at 224 pixels, counted on the authors' code.
COUNTED = {
    "sparsifiner_deit_tiny_patch16_224": (5.92, 1.34),
    "sparsifiner_deit_small_patch16_224": (22.25, 4.77),
    "sparsifiner_deit_base_patch16_224": (86.77, 17.92),
    "sparsifiner_lvvit_small": (26.42, 6.79),
    "sparsifiner_lvvit_medium": (56.17, 13.07),
    "tap_fan_tiny_8_p4_hybrid": (7.52, 3.65),
    "tap_fan_small_12_p4_hybrid": (26.26, 7.01),
    "tap_fan_base_16_p4_hybrid": (50.74, 11.82),
    "tap_fan_large_16_p4_hybrid": (77.24, 17.76),
    "tap_fan_tiny_12_p16_224": (7.40, 1.49),
    "tap_fan_small_12_p16_224": (28.51, 5.49),
    "tap_fan_base_18_p16_224": (54.64, 10.72),
    "tap_fan_large_24_p16_224": (80.99, 16.04),
    "tap_rvt_tiny": (8.74, 1.30),
    "tap_rvt_small": (22.32, 4.68),
    "tap_rvt_base": (87.09, 17.62),
    "tap_rvt_tiny_plus": (11.05, 1.30),
    "tap_rvt_small_plus": (23.47, 4.68),
    "tap_rvt_base_plus": (89.40, 17.62),
}


def test_sizes_are_those_of_the_authors_code(run):
    facts = {fact["name"]: fact for fact in json.loads(run("models", "--json").out)}
    for name, (params, gmacs) in COUNTED.items():
        assert facts[name]["params"] == pytest.approx(params, rel=0.01), name
        assert facts[name]["gmacs"] == pytest.approx(gmacs, rel=0.01), name
    top1 = {name: fact["top1"] for name, fact in facts.items() if name.startswith("tap_") and fact["top1"]}
    assert top1 == {"tap_fan_base_16_p4_hybrid": 84.3, "tap_rvt_base_plus": 83.1}


def test_models_searches_timm_too(run):
    done = run("models", "resnet18", "--all")
    assert done.code == 0 and "huggingface.co/timm/resnet18.a1_in1k" in done.out and "11.69" in done.out
    nothing = run("models", "no_such_model")
    assert nothing.code == 2 and "--all also searches" in nothing.err


@pytest.fixture
def store(tmp_path: Path) -> dict[str, dict[str, str]]:
    return {"env": {"ATTNSUITE_HOME": str(tmp_path / "store")}}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """What litv2_small's published file looks like, with weights that are nobody's."""
    torch.save({"model": timm.create_model("litv2_small").state_dict(), "epoch": 299}, tmp_path / "litv2_s.pth")
    return tmp_path / "litv2_s.pth"


def test_an_imported_file_is_used_and_verified(run, official, store, tmp_path):
    assert run("weights", "verify", "litv2_small", **store).code == 1  # absent
    done = run("weights", "import", "litv2_small", official, **store)
    assert done.code == 0, done.err
    assert done.out.startswith("litv2_small.in1k: ") and done.out.strip().endswith("model.safetensors")
    listed = {fact["name"]: fact for fact in json.loads(run("weights", "list", "--json", **store).out)}
    assert listed["litv2_small.in1k"]["path"] and not listed["litv2_base.in1k"]["path"]
    verified = run("weights", "verify", **store)
    assert verified.code == 0 and "litv2_small.in1k: ok (not pinned)" in verified.out
    used = run("classify", SAMPLES / "cat.jpg", "--model", "litv2_small", "--json", **store)
    assert used.code == 0, used.err
    row = json.loads(used.out)
    assert row["model"] == "litv2_small.in1k" and row["status"] == "ok"
    path = Path(listed["litv2_small.in1k"]["path"])
    path.write_bytes(path.read_bytes()[:-8] + b"\x01" * 8)
    damaged = run("weights", "verify", **store)
    assert damaged.code == 1 and "has changed since it arrived" in damaged.err


def test_a_wrong_file_is_not_imported(run, store, tmp_path):
    torch.save({"model": timm.create_model("litv2_nano").state_dict()}, tmp_path / "nano.pth")
    done = run("weights", "import", "litv2_small", "nano.pth", **store)
    assert done.code == 2 and "does not fit litv2_small" in done.err and "Traceback" not in done.err
    unknown = run("weights", "fetch", "litv2_smal", **store)
    assert unknown.code == 2 and "did you mean litv2_small" in unknown.err


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine that holds what is in `tmp_path/mirror`."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing to the test's stderr."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_brings_what_a_server_has_and_names_what_it_has_not(run, official, mirror, tmp_path):
    shutil.move(official, tmp_path / "mirror/litv2_small.in1k.pth")
    server = {"env": {"ATTNSUITE_HOME": str(tmp_path / "store"), "ATTNSUITE_MIRROR": mirror}}
    done = run("weights", "fetch", "litv2_base", "litv2_small", "tf_efficientnet_lite0", **server)
    assert done.code == 1, "one of three is not there"
    assert "litv2_base.in1k" in done.err and "404" in done.err and "Traceback" not in done.err
    assert "fetching litv2_small.in1k" in done.err
    small, lite = done.out.splitlines()
    assert small.startswith("litv2_small.in1k: ") and Path(small.partition(": ")[2]).is_file()
    assert lite.startswith("tf_efficientnet_lite0.in1k: ")
    (tmp_path / "mirror/litv2_small.in1k.pth").unlink()
    again = run("weights", "fetch", "litv2_small", **server)
    assert again.code == 0 and "fetching" not in again.err, "it is here already"


def test_fetch_says_first_what_a_licence_asks(run, mirror, tmp_path):
    torch.save({"model_state_dict": {"module.w": torch.ones(2)}}, tmp_path / "mirror/aki_4b.phi3_5_mini.pth")
    server = {"env": {"ATTNSUITE_HOME": str(tmp_path / "store"), "ATTNSUITE_MIRROR": mirror}}
    done = run("weights", "fetch", "aki_4b", **server)
    assert done.code == 0 and done.out.startswith("aki_4b.phi3_5_mini: "), done.err
    terms, fetching, unpinned = done.err.splitlines()
    assert terms.startswith("aki_4b.phi3_5_mini: CC BY-NC 4.0") and "no commercial use" in terms
    assert fetching == "fetching aki_4b.phi3_5_mini"
    assert unpinned.startswith("aki_4b.phi3_5_mini is not pinned")
    listed = json.loads(run("weights", "list", "aki*", "--json", **server).out)
    assert [(fact["license"], fact["path"] is not None) for fact in listed] == [("cc-by-nc-4.0", True)]


def test_the_list_says_which_files_are_pinned(run):
    listed = json.loads(run("weights", "list", "--json").out)
    assert {fact["name"] for fact in listed if fact["pinned"]} == {"tf_efficientnet_lite0.in1k"}
    table = run("weights", "list", "*lite0*").out + run("weights", "list", "litv2_small.in1k").out
    assert len([line for line in table.splitlines() if " not pinned " in line]) == 1


def test_a_verb_fetches_the_weights_it_needs(run, official, mirror, tmp_path):
    shutil.move(official, tmp_path / "mirror/litv2_small.in1k.pth")
    server = {"env": {"ATTNSUITE_HOME": str(tmp_path / "store"), "ATTNSUITE_MIRROR": mirror}}
    done = run("classify", SAMPLES / "cat.jpg", "--model", "litv2_small", "--json", **server)
    assert done.code == 0 and json.loads(done.out)["model"] == "litv2_small.in1k"
    absent = run("classify", SAMPLES / "cat.jpg", "--model", "litv2_base", "-o", "o.csv", **server)
    assert absent.code == 2 and "404" in absent.err and "weights import litv2_base.in1k FILE" in absent.err
    assert not (tmp_path / "o.csv").exists()


@pytest.fixture
def own_checkpoint(tmp_path: Path) -> Path:
    """A fine-tuned network with seven classes and their names, as timm saves it."""
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("litv2_nano", num_classes=7)
    names = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu"]
    save_for_hf(model, tmp_path / "own", model_config={"label_names": names}, safe_serialization=True)
    return tmp_path / "own"


def test_a_checkpoint_shows_its_own_labels(run, own_checkpoint, tmp_path):
    names = {"ant", "bee", "cow", "dog", "eel", "fox", "gnu"}
    rows = {}
    for name, options in {
        "folder": ("--model", f"local-dir:{own_checkpoint}"),
        "file": ("--model", "litv2_nano", "--checkpoint", own_checkpoint / "model.safetensors"),
    }.items():
        done = run("classify", SAMPLES / "cat.jpg", *options, "--top-k", 7, "--json")
        assert done.code == 0, done.err
        rows[name] = json.loads(done.out)
        assert {rows[name][f"label_{rank}"] for rank in range(1, 8)} == names
    assert rows["folder"]["prob_1"] == rows["file"]["prob_1"]
    shutil.copy(own_checkpoint / "model.safetensors", tmp_path / "bare.safetensors")
    bare = run("classify", SAMPLES / "cat.jpg", "--model", "litv2_nano", "--checkpoint", "bare.safetensors", "--json")
    assert json.loads(bare.out)["label_1"].startswith("class_")


def test_a_checkpoint_that_lacks_weights_is_no_network(run, tmp_path):
    """timm loads a DLA without minding what is missing, and would go on with random numbers."""
    whole = timm.create_model("dla46x_c").state_dict()
    torch.save({name: weight for name, weight in whole.items() if "fc" not in name}, tmp_path / "part.pth")
    done = run("classify", SAMPLES / "cat.jpg", "--model", "dla46x_c", "--checkpoint", "part.pth")
    assert done.code == 2 and "lack 2 of its entries (fc.weight, fc.bias)" in done.err, done.err


def test_weights_that_are_zero_are_weights():
    zeros = {name: torch.zeros_like(weight) for name, weight in timm.create_model("test_vit").state_dict().items()}
    with NoInitialWeights():
        module = timm.create_model("test_vit")
    module.load_state_dict(zeros)
    assert not left_blank(module)


def test_nothing_but_weights_differs_where_initial_ones_are_left_out():
    for name in ("litv2_nano", "test_vit", "dla46x_c"):
        torch.manual_seed(0)
        drawn = timm.create_model(name)
        with NoInitialWeights():
            blank = timm.create_model(name)
        assert left_blank(blank)
        for (key, one), (_, other) in zip(drawn.named_buffers(), blank.named_buffers(), strict=True):
            assert torch.equal(one, other), key
        blank.load_state_dict(drawn.state_dict())
        assert not left_blank(blank)
        images = torch.randn(1, *drawn.pretrained_cfg["input_size"])
        assert torch.equal(drawn.eval()(images), blank.eval()(images))


def test_another_content_of_the_checkpoint_is_another_command(run, own_checkpoint, tmp_path):
    command = ("classify", SAMPLES, "-o", "o.csv", "--model", "litv2_nano", "--checkpoint", "mine.pth")
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(timm.create_model("litv2_nano").state_dict(), tmp_path / "mine.pth")
        done = run(*command)
        assert done.code == (0 if seed == 1 else 2), done.err
    assert "weights was 'sha256" in done.err


def test_a_published_checkpoint_loads_through_the_architectures_own_renaming(run, tmp_path):
    """tf_efficientnet_lite0's package file has other names than timm; loaded by `weights`, saved, given by hand."""
    model = timm.create_model("tf_efficientnet_lite0")
    torch.save(weights.state_dict_for("tf_efficientnet_lite0.in1k", model), tmp_path / "lite0.pth")
    by_hand = run("classify", SAMPLES / "coffee.jpg", "--checkpoint", "lite0.pth", "--json")
    default = run("classify", SAMPLES / "coffee.jpg", "--json")
    one, other = json.loads(by_hand.out), json.loads(default.out)
    assert (
        one.pop("model") == "tf_efficientnet_lite0 (lite0.pth)" and other.pop("model") == "tf_efficientnet_lite0.in1k"
    )
    assert one == other


def test_labels_of_every_imagenet_and_of_none():
    class Model(torch.nn.Module):
        def __init__(self, num_classes: int, **config: object) -> None:
            super().__init__()
            self.num_classes, self.pretrained_cfg = num_classes, config

    assert label_names(Model(1000))[504] == "coffee mug"
    for count in (11_221, 11_821, 21_841, 21_843):
        names = label_names(Model(count))
        assert len(names) == count and not names[0].startswith("class_")
    assert label_names(Model(18))[17] == "class_17"
    assert label_names(Model(0)) == []
    assert label_names(Model(3, label_names={"0": "a", "2": "c"})) == ["a", "class_1", "c"]
    assert label_names(Model(2, label_names=["n1", "n2"], label_descriptions={"n1": "cat"})) == ["cat", "n2"]


def test_random_weights_are_the_same_every_time_and_say_so(run):
    rows = [
        run("classify", SAMPLES / "cat.jpg", "--model", "litv2_nano", "--random-weights", "--json").out for _ in "ab"
    ]
    assert rows[0] == rows[1] and json.loads(rows[0])["model"] == "litv2_nano (random weights)"


def test_half_precision_gives_the_same_labels(run):
    done = run("classify", SAMPLES, "--amp", "--json")
    assert done.code == 0, done.err
    labels = {Path(row["path"]).name: row["label_1"] for row in map(json.loads, done.out.splitlines())}
    assert labels["coffee.jpg"] == "espresso" and labels["camera.jpg"] == "tripod"


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a compiler")
def test_a_compiled_network_gives_the_same_rows(run):
    """Five samples in batches of two: the last one is filled up, so that one shape is compiled."""
    command = ("classify", SAMPLES, "--model", "test_vit4", "--random-weights", "--json", "--batch-size", 2)
    plain, compiled = (
        [json.loads(line) for line in run(*command, *extra, "--threads", 1).out.splitlines()]
        for extra in ((), ("--compile",))
    )
    assert len(plain) == len(compiled) == len(list(SAMPLES.glob("*.jpg")))
    for one, other in zip(plain, compiled, strict=True):
        assert (one["path"], one["label_1"]) == (other["path"], other["label_1"])
        assert one["prob_1"] == pytest.approx(other["prob_1"], abs=1e-5)
