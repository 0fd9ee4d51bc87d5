"""Set-up: pins that fit pyproject.toml, no hosts, and a second call that does nothing."""

import re
import subprocess
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "scripts/constraints.txt").read_text(), re.M)
}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for group in [project["dependencies"], *extras] for text in group]


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    for requirement in requirements():
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None and requirement.specifier.contains(pin), (str(requirement), pin)
    assert PINS["torch"] == "2.13.0"


def test_constraints_are_plain_pins():
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in lines)  # no hosts, paths or local builds


@pytest.mark.parametrize("script", ["scripts/setup.sh", "scripts/demo.sh", "scripts/test.sh", ".ci/run"])
def test_scripts_parse_and_stop_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text()


def copy_of_setup(folder: Path) -> Path:
    (folder / "scripts").mkdir()
    for name in ("scripts/setup.sh", "scripts/constraints.txt", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    return folder / "scripts" / "setup.sh"


def test_a_python_that_is_too_old_is_named(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    script = copy_of_setup(tmp_path)
    run = subprocess.run(
        ["bash", script], env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)}, capture_output=True, text=True
    )
    assert run.returncode == 1 and "need Python 3.11 or newer" in run.stderr and "Python 3.8.1" in run.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_second_call_installs_nothing_and_a_changed_pin_does(tmp_path):
    script = copy_of_setup(tmp_path)
    calls = tmp_path / "calls"
    fake = tmp_path / "python"  # stands in for the interpreter and for that of the environment: notes its calls
    fake.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n'
                    f'[ "$2" = venv ] && mkdir -p .venv/bin && cp {fake} .venv/bin/python\nexit 0\n')  # fmt: skip
    fake.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake)}

    def installs() -> int:
        calls.write_text("")
        subprocess.run(["bash", script], env=environment, check=True, capture_output=True)
        return calls.read_text().count("pip install")

    assert [installs(), installs()] == [2, 0]
    constraints = tmp_path / "scripts" / "constraints.txt"
    constraints.write_text(constraints.read_text() + "six==1.0\n")
    assert [installs(), installs()] == [2, 0]
