"""What holds for the package as a whole."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import panterra

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "panterra"
FILES = sorted(PACKAGE.rglob("*.py"))

BASIS = ("errors", "files", "plain", "modalities", "sample", "energy")
CHAIN = ("objectives", "train", "evaluate", "finetune", "recipes", "mapping", "studio", "commands", "cli", "__main__")
# What a part may import, besides itself. "panterra" stands for the public names and the version, for those at the edge.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "plain": set(),
    "modalities": set(),
    "sample": {"errors", "modalities"},
    "energy": {"errors"},
    "imagery": {*BASIS},
    "planet": {*BASIS, "imagery"},
    "data": {*BASIS, "imagery", "planet"},
    "models": {*BASIS},
}
for part in CHAIN:
    ALLOWED[part] = {*ALLOWED, "panterra"}


def part_of(module: str) -> str:
    """Name the part of the package that a dotted module name belongs to."""
    return module.split(".")[1] if "." in module else module


def imported_parts(path: Path) -> set[str]:
    """List the parts of the package that a file imports, wherever in the file."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "panterra":
                names = [f"panterra.{a.name}" if is_module(a.name) else "panterra" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {part_of(name) for name in names if name.split(".")[0] == "panterra"}
    return parts


def is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def loaded_by(code: str) -> set[str]:
    """Run code in a fresh interpreter and list the top-level modules it has loaded."""
    script = f"import sys\n{code}\nprint('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    wrong = imported_parts(path) - ALLOWED[part] - {part}
    assert not wrong, f"{path.relative_to(ROOT)} must not import panterra.{sorted(wrong)[0]}"


def test_no_file_is_named_after_nothing():
    empty = {"utils", "util", "common", "helpers", "helper", "base", "core", "misc"}
    assert not [p for p in FILES if p.stem in empty or p.parent.name in empty]


def test_public_names_are_the_headings_of_the_api_page():
    headings = re.findall(r"^### `(?:panterra\.)?(\w+)`", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(panterra.__all__)


def test_every_public_name_can_be_imported_and_says_what_it_is():
    for name in panterra.__all__:
        value = getattr(panterra, name)
        assert name == "MODALITIES" or (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_importing_the_package_stays_light():
    assert not {"torch", "rasterio", "numpy", "zarr", "geopandas"} & loaded_by("import panterra")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["embed", "--help"], ["map", "--help"]])
def test_help_stays_light(arguments):
    heavy = {"torch", "rasterio", "zarr", "geopandas", "xarray", "matplotlib"}
    assert not heavy & loaded_by(f"from panterra.cli import main\nassert main({arguments!r}) == 0")


def test_torchvision_stays_out():
    assert importlib.util.find_spec("torchvision") is None, (
        "see constraints.txt: torchvision breaks a CPU build of torch"
    )


def test_torch_keeps_its_upper_bound():
    bound = re.search(r'"torch>=[\d.]+,<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert bound is not None
    assert f"torch<{bound[1]}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_every_source_file_says_why_it_exists():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"
