"""The package as users get it: a wheel, a version, types, a command that answers at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement

import triscale
from triscale.randomness import derive_seed

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `command`, outside of the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT.anchor,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the environment's own build backend, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = run("-m", "pip", "--quiet", "install", "--no-index", "--no-deps", "--target", folder, wheel)
    assert pip.returncode == 0, pip.stderr
    return folder


def test_the_wheel_holds_the_package_its_types_and_its_licence_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert modules | {"triscale/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"triscale", f"triscale-{triscale.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_version_is_the_one_that_the_package_and_the_changelog_name(installed: Path) -> None:
    (folder,) = installed.glob("*.dist-info")
    metadata = Distribution.at(folder)
    assert metadata.version == triscale.__version__
    assert f"## {triscale.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {triscale.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (script,) = metadata.entry_points
    assert (script.name, script.value) == ("triscale", "triscale.__main__:run")


def test_the_installed_command_answers_help_from_any_folder(installed: Path) -> None:
    program = "import triscale, sys; print(triscale.__file__, file=sys.stderr)"
    assert run("-c", program, PYTHONPATH=str(installed)).stderr.startswith(str(installed))
    answer = run("-m", "triscale", "--help", PYTHONPATH=str(installed))
    assert answer.returncode == 0, answer.stderr
    assert "train" in answer.stdout


def test_exports_are_found_when_asked_for_and_others_are_refused() -> None:
    assert set(triscale.__all__) <= set(dir(triscale))
    for name in triscale.__all__:
        assert getattr(triscale, name).__name__.split(".")[-1] == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = triscale.nonsense


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
    text = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", text, flags=re.MULTILINE))
    assert {requirement.name for requirement in asked} == set(pins)
    for requirement in asked:
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} against {pins[requirement.name]}"


def test_annotations_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        derive_seed(0.5)  # type: ignore[arg-type]
