"""The structure of the project itself: who may import whom, what the command loads, what the metadata promises."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# Floor by floor: what each part may import of ours. Whatever is not a key here is nobody's to import.
ARROWS = {
    "weights": set(),
    "vision": {"weights"},
    "diffusion": {"weights"},
    "multimodal": {"weights"},
    "attnsuite": {"weights", "vision", "diffusion", "multimodal"},
    "apps": {"weights", "vision", "diffusion", "multimodal", "attnsuite"},
    "benchmarks": {"weights", "vision", "diffusion", "multimodal", "attnsuite", "apps", "recipes"},
    "recipes": {"weights", "vision", "diffusion", "multimodal", "attnsuite"},
}
INSTALLED = ("weights", "vision", "diffusion", "multimodal", "apps")
OURS = {*ARROWS, "tests"}


def modules(part: str) -> list[Path]:
    """The Python files of a part, which is a folder or one file."""
    if (ROOT / f"{part}.py").is_file():
        return [ROOT / f"{part}.py"]
    return sorted((ROOT / part).rglob("*.py"))


def parts() -> list[str]:
    return [part for part in ARROWS if modules(part)]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """Top-level names of all imports in a module of `package`, however deep in the code and however spelt."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            inside = package[: len(package) - node.level + 1]
            yield inside[0] if inside else str(node.module or node.names[0].name).partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value).partition(".")[0]


def trespasses(part: str, path: Path) -> set[str]:
    package = path.relative_to(ROOT).parent.parts
    return (set(imported(tree_of(path), package)) & OURS) - ARROWS[part] - {part}


@pytest.mark.parametrize("part", parts())
def test_imports_follow_the_arrows(part: str):
    found = {str(path.relative_to(ROOT)): wrong for path in modules(part) if (wrong := trespasses(part, path))}
    assert not found, f"{part} may import {sorted(ARROWS[part]) or 'nothing'} of ours"


@pytest.mark.parametrize(
    "source",
    [
        "import vision",
        "import vision.litv2 as l",
        "from vision import litv2",
        "from vision.litv2 import HiLo",
        "def f():\n    if True:\n        from vision import litv2",
        "import importlib\nimportlib.import_module('vision.litv2')",
        "__import__('vision')",
        "from ..vision import litv2",
        "from ... import vision",
    ],
)
def test_the_check_of_the_arrows_sees_every_spelling(source: str):
    assert "vision" in set(imported(ast.parse(source), ("weights",)))


def test_the_check_of_the_arrows_lets_a_package_import_itself():
    assert set(imported(ast.parse("from .store import fetch\nfrom ..errors import E"), ("apps", "batch"))) == {"apps"}


@pytest.mark.parametrize("part", [p for p in INSTALLED if modules(p)])
def test_no_package_is_an_empty_shell(part: str):
    assert (ROOT / part / "__init__.py").is_file()
    assert (ROOT / part / "py.typed").is_file()
    holding = [
        path
        for path in modules(part)
        if any(isinstance(n, ast.ClassDef | ast.FunctionDef) for n in ast.walk(tree_of(path)))
    ]
    assert holding, f"{part} holds no code"
    for folder in {path.parent for path in modules(part)}:
        assert any(path.parent == folder for path in holding), f"{folder.relative_to(ROOT)} holds no code"


def is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function only pretends: `pass`, `...` or NotImplementedError, a docstring apart."""
    if any("abstract" in ast.unparse(d) or "overload" in ast.unparse(d) for d in function.decorator_list):
        return False
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if len(body) != 1:
        return not body
    (only,) = body
    return (
        isinstance(only, ast.Pass)
        or (isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant) and only.value.value is ...)
        or (isinstance(only, ast.Raise) and only.exc is not None and "NotImplementedError" in ast.unparse(only.exc))
    )


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a module, except the bodiless ones by which a Protocol describes others."""
    protocol: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
            protocol.update(node.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node not in protocol:
            yield node


@pytest.mark.parametrize("part", parts())
def test_no_function_is_a_stub(part: str):
    every = [(path, function) for path in modules(part) for function in functions(tree_of(path))]
    written = {function.name for _, function in every if not is_stub(function)}
    stubs = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path, function in every
        # A base class may leave a step to its subclasses, where one of them takes it.
        if is_stub(function) and function.name not in written
    ]
    assert not stubs


@pytest.mark.parametrize("part", [p for p in parts() if p in (*INSTALLED, "attnsuite")])
def test_every_module_has_a_docstring_and_says_what_it_exports(part: str):
    for path in modules(part):
        tree = tree_of(path)
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
        assigned = {ast.unparse(t) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}
        code = any(not isinstance(node, ast.Expr) for node in tree.body)
        assert "__all__" in assigned or not code, f"{path.relative_to(ROOT)} states no __all__"


HELP = """
import sys
sys.argv = ["attnsuite", "--help"]
from apps.cli import main
try:
    status = main()
except SystemExit as stop:
    status = stop.code
heavy = {"torch", "torchvision", "timm", "gradio", "transformers", "diffusers", "cv2", "pyarrow"} & set(sys.modules)
print("LOADED", *sorted(heavy), file=sys.stderr)
sys.exit(status)
"""


def test_help_loads_nothing_heavy():
    result = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "classify" in result.stdout and "weights" in result.stdout
    assert result.stderr.strip().splitlines()[-1] == "LOADED"


def cpu_seconds(*command: str) -> float:
    """CPU time of a process, user and system; wall time would measure what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_at_once(record_property):
    ours = statistics.median(cpu_seconds(sys.executable, "-c", HELP) for _ in range(5))
    bare = statistics.median(cpu_seconds(sys.executable, "-c", "pass") for _ in range(5))
    record_property("help_cpu_seconds", round(ours - bare, 3))
    assert ours - bare < 0.5, f"--help took {ours:.2f} s of CPU time, python -c pass {bare:.2f} s"


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(block: str) -> list[Requirement]:
    return [Requirement(line) for line in block.strip().splitlines()]


def test_the_metadata_is_as_promised(setup_cfg: configparser.ConfigParser):
    assert setup_cfg["metadata"]["name"] == "attnsuite"
    assert setup_cfg["metadata"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert setup_cfg["options"]["python_requires"] == ">=3.11"
    assert {"test", "dev", "ray", "heic", "browser", "demo"} <= set(setup_cfg["options.extras_require"])
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="attnsuite")
    assert script.value == "apps.cli:main" and callable(script.load())


def test_requirements_are_lower_bounds_and_opencv_is_headless(setup_cfg: configparser.ConfigParser):
    blocks = [setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()]
    needed = [r for block in blocks for r in requirements(block) if r.name != "attnsuite"]
    assert all({s.operator for s in r.specifier} == {">="} for r in needed)
    assert "opencv-python-headless" in {r.name for r in needed}
    assert not {"opencv-python", "gradio"} & {r.name for r in requirements(blocks[0])}


def test_pyproject_says_only_what_setup_cfg_cannot():
    tables = set(re.findall(r"^\[([\w.-]+)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    assert all(t == "build-system" or t.startswith(("tool.ruff", "tool.pyright")) for t in tables), tables


def bash_blocks(text: str) -> list[str]:
    return [block.strip() for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)]


def test_the_readme_offers_two_commands_of_one_line_each():
    main_job, tests = bash_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(main_job.splitlines()) == len(tests.splitlines()) == 1
    assert "install ." in main_job and "attnsuite classify samples" in main_job
    assert '".[test]"' in tests and "-m pytest" in tests


def test_ci_runs_the_second_command_of_the_readme():
    shown = subprocess.run([str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == bash_blocks((ROOT / "README.md").read_text(encoding="utf-8"))[1]


def test_ci_also_tests_the_oldest_versions(setup_cfg: configparser.ConfigParser):
    shown = subprocess.run([str(ROOT / ".ci" / "oldest"), "--show"], capture_output=True, text=True, check=True)
    oldest = {r.name: r for r in requirements(shown.stdout)}
    extras = setup_cfg["options.extras_require"]
    blocks = [setup_cfg["options"]["install_requires"], *(extras[name] for name in extras if name != "dev")]
    claimed = [r for block in blocks for r in requirements(block) if r.name != "attnsuite"]
    for r in claimed:
        assert str(r).replace(">=", "==") == str(oldest[r.name])
    assert len(claimed) > 30 and set(oldest) == {r.name for r in claimed} | {"opencv-python"}


def test_samples_are_small_photographs_with_credit():
    from PIL import Image

    credits = (ROOT / "samples" / "README.md").read_text(encoding="utf-8")
    photographs = sorted((ROOT / "samples").glob("*.jpg"))
    assert len(photographs) >= 5
    for path in photographs:
        row = next(line for line in credits.splitlines() if f"`{path.name}`" in line)
        assert "CC0 1.0" in row or "public domain" in row
        assert path.stat().st_size < 80_000
        with Image.open(path) as image:
            assert max(image.size) <= 512 and image.format == "JPEG"


def test_citations_name_the_paper_of_every_method():
    import weights

    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        paper = re.search(r"\[Paper\]\((\S+)\)", page.read_text(encoding="utf-8"))
        assert paper and f"url: {paper[1]}\n" in cff, page.name
    for entry in weights.entries():
        if entry.family != "efficientnet_lite":  # the default classifier, no method of ours
            assert entry.paper in cff and entry.paper_url in cff
