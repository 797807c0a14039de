"""The repository root is the package: what the wheel holds, and that users' own names are safe."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import triune

ROOT = Path(triune.__file__).parent
OUTSIDE = ("tests/", ".ci/", "policies/client/", "policies/plugin/")  # tracked, and no part of the package


def tracked() -> list[str]:
    """The files of the working tree that git does not ignore, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy of the files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_every_wheel_file_sits_under_triune(wheel: list[str]) -> None:
    stray = [name for name in wheel if not re.match(r"triune/|triune_vla-[^/]+\.dist-info/", name)]
    assert stray == []


def test_the_wheel_holds_every_module(wheel: list[str]) -> None:
    modules = {f"triune/{name}" for name in tracked() if name.endswith(".py") and not name.startswith(OUTSIDE)}
    missing = sorted(modules - set(wheel))
    assert not missing, f"list these packages in pyproject.toml, [tool.setuptools] packages: {missing}"


def test_the_wheel_holds_every_data_file(wheel: list[str]) -> None:
    folders = ("configs/", "vla/assets/", "eval/templates/")
    data = {f"triune/{name}" for name in tracked() if name.startswith(folders) and name != "configs/README.md"}
    missing = sorted(data - set(wheel))
    assert not missing, f"list these files in pyproject.toml, [tool.setuptools.package-data]: {missing}"


def test_the_wheel_holds_no_tests_and_no_runs(wheel: list[str]) -> None:
    assert [name for name in wheel if name.startswith(("triune/tests", "triune/runs", "triune/.venv"))] == []


def test_a_script_beside_its_own_names_still_works(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("MINE = 'my data'\n")
    (tmp_path / "eval.py").write_text("MINE = 'my eval'\n")
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("MINE = 'my envs'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import data, envs, eval\n"
        "import triune.data, triune.envs, triune.eval, triune.policies, triune.vla\n"
        "from triune.data import Observation\n"
        "assert (data.MINE, eval.MINE, envs.MINE) == ('my data', 'my eval', 'my envs')\n"
        "assert triune.data is not data and Observation.__module__.startswith('triune.data')\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


PRIVATE = re.compile(
    r"(?<![\w.])/(work|tmp|root|home|opt|Users)/|(?<![\w.-])(index|extra-index)-url|https?://[^\s\"')]*(pypi|simple/)|file://"
)


def test_no_tracked_file_names_a_machine_or_an_index() -> None:
    for name in tracked():
        path = ROOT / name
        if path.suffix in {".pem", ".png", ".safetensors", ".mp4", ".parquet"} or name == "tests/test_packaging.py":
            continue
        found = [line for line in path.read_text(errors="replace").splitlines() if PRIVATE.search(line)]
        assert not found, f"{name}: {found[:3]}"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-peers.txt"])
def test_constraints_are_plain_pins(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
