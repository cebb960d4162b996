"""The API of the demos: names that programs rely on, as docs/demos.md has them."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from gradio_client import Client
from support import ROOT

ENDPOINTS = {
    "/see": ["image", "sample", "model", "other", "method", "target", "untrained", "opacity"],
    "/attend": ["image", "sample", "model", "x", "y", "layer", "connectivity", "untrained", "opacity"],
    "/generate": ["prompt", "subjects", "methods", "seed", "steps", "guidance_scale", "layout", "painted"],
    "/ask": ["image", "sample", "question", "mma", "vmtc", "cmai", "max_tokens"],
    "/look": [
        "image", "sample", "rows", "columns", "target", "boxes", "boxes_file", "humans", "humans_image",
        "num_scanpaths", "temperature", "max_refixations", "seed",
    ],
    "/models": ["pattern", "family"],
    "/results": ["method", "verdict", "search"],
}  # fmt: skip


def test_names_stay(serve: Any):
    with contextlib.closing(Client(serve(), verbose=False)) as client:
        api: Any = client.view_api(return_format="dict", print_info=False)
    found = {name: [p["parameter_name"] for p in one["parameters"]] for name, one in api["named_endpoints"].items()}
    assert {name: {*given} for name, given in found.items()} == {name: {*given} for name, given in ENDPOINTS.items()}
    assert not api["unnamed_endpoints"]
    for name, one in api["named_endpoints"].items():
        assert one["description"], f"{name} does not say what it does"


def test_every_name_is_documented():
    page = (ROOT / "docs" / "demos.md").read_text("utf-8")
    for name, parameters in ENDPOINTS.items():
        assert f"`{name}`" in page
        for parameter in parameters:
            assert re.search(rf"`{parameter}`", page), f"docs/demos.md does not name {parameter} of {name}"
