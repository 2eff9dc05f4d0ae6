"""What installs, from wheels, sdists and editable, and what an uninstalled checkout imports: never a top `kernels`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from fastcfg import _moved

KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
CHECKPOINT_FILES = sorted(path.name for path in (ROOT / "fastcfg" / "checkpoints").glob("*") if path.is_file())
SHIPPED = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
    "constraints.txt",
    "Makefile",
)

HEAVY = ("triton", "PIL", "tokenizers", "tqdm", "safetensors", "matplotlib", "diffusers", "k_diffusion", "transformers")


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without settings of this process that could help it."""
    dropped = {"PYTHONPATH", "TRITON_INTERPRET"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def make_environment(folder: Path) -> Path:
    """The Python of an empty environment that sees this one's packages, but nothing installed in it as editable."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    own = site_packages(python)
    # A path in a .pth file is appended to sys.path and its own .pth files are not read.
    (own / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python


def site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=python.parent))


def add_foreign_kernels(python: Path) -> Path:
    """A package like Hugging Face's `kernels`, which is what transformers and diffusers import by that name."""
    package = site_packages(python) / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(repo_id):\n    return repo_id\n")
    return package


def kernel_imports() -> str:
    """Statements that import every module of fastcfg.kernels."""
    return "".join(f"import fastcfg.kernels.{name.removesuffix('.py')}; " for name in KERNELS)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads, symlink as symlink: building in the checkout would leave files there."""
    copy = tmp_path_factory.mktemp("checkout") / "fastcfg"
    copy.mkdir()
    for name in SHIPPED:
        shutil.copy2(ROOT / name, copy / name)
    for folder in ("fastcfg", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    return copy


def build_wheel(source: Path, out: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--wheel-dir", out]
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, out, cwd=checkout)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with an editable install, and a foreign `kernels` beside it."""
    python = make_environment(tmp_path_factory.mktemp("editable") / "venv")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--ignore-installed"]
    run(python, "-m", "pip", "install", *options, "-e", checkout, cwd=python.parent)
    return python


@pytest.fixture
def foreign_kernels(editable: Path) -> Iterator[Path]:
    package = add_foreign_kernels(editable)
    yield package
    shutil.rmtree(package)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_kernels_under_fastcfg_and_nothing_at_the_top(wheel: Path) -> None:
    names = names_in(wheel)
    assert {name for name in names if name.startswith("fastcfg/kernels/")} == {f"fastcfg/kernels/{k}" for k in KERNELS}
    assert {name.split("/")[0] for name in names} == {"fastcfg", f"{wheel.name.split('-py3')[0]}.dist-info"}


def test_wheel_holds_every_module_the_typing_marker_and_the_checkpoint(wheel: Path) -> None:
    names = names_in(wheel)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastcfg").rglob("*.py")}
    assert modules <= names
    assert "fastcfg/py.typed" in names
    assert {f"fastcfg/checkpoints/{name}" for name in CHECKPOINT_FILES} <= names


def test_wheel_names_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"{wheel.name.split('-py3')[0]}.dist-info"
        assert "fastcfg = fastcfg.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert 'Requires-Dist: triton>=3.4; sys_platform == "linux"' in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_wheel_built_from_the_sdist_is_the_wheel_built_from_the_checkout(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if "/fastcfg/kernels/" in name]
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    out = tmp_path / "wheel"
    out.mkdir()
    assert names_in(build_wheel(source, out)) == names_in(wheel)


def test_installed_wheel_imports_and_leaves_the_name_kernels_free(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages(python))
    check = "import importlib.util as u, fastcfg; print(u.find_spec('kernels'), fastcfg.__file__)"
    spec, file = run(python, "-c", kernel_imports() + check, cwd=tmp_path).split(" ", 1)
    assert spec == "None"
    assert Path(file) == site_packages(python) / "fastcfg" / "__init__.py"


def test_editable_install_imports_the_checkout_and_leaves_the_name_kernels_free(
    editable: Path, checkout: Path, tmp_path: Path
) -> None:
    check = "import importlib.util as u, fastcfg; print(u.find_spec('kernels'), fastcfg.__file__)"
    spec, file = run(editable, "-c", kernel_imports() + check, cwd=tmp_path).split(" ", 1)
    assert spec == "None"
    assert Path(file) == checkout / "fastcfg" / "__init__.py"


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_import_kernels_is_the_foreign_package(
    where: str, editable: Path, foreign_kernels: Path, checkout: Path, tmp_path: Path
) -> None:
    check = "import kernels; print(kernels.get_kernel('a/b'), kernels.__file__)"
    result, file = run(
        editable, "-c", kernel_imports() + check, cwd=checkout if where == "checkout" else tmp_path
    ).split(" ", 1)
    assert result == "a/b"
    assert Path(file) == foreign_kernels / "__init__.py"


def test_uninstalled_checkout_imports_and_runs_pytest(checkout: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    add_foreign_kernels(python)
    (checkout / "tests").mkdir(exist_ok=True)
    statements = [*filter(None, kernel_imports().split("; ")), "import fastcfg", "import kernels"]
    lines = [*statements, f"assert fastcfg.__file__.startswith({str(checkout)!r})", "kernels.get_kernel('a/b')"]
    body = "".join(f"    {line}\n" for line in lines)
    (checkout / "tests" / "test_import.py").write_text(f"def test_import():\n{body}")
    assert "1 passed" in run(python, "-m", "pytest", "-p", "no:cacheprovider", "-q", cwd=checkout)


def test_a_checkout_without_symbolic_links_imports_the_kernels(checkout: Path, tmp_path: Path) -> None:
    """As git makes one on Windows: the link is a text file with its target."""
    python, copy = make_environment(tmp_path / "venv"), tmp_path / "fastcfg"
    shutil.copytree(checkout, copy, symlinks=True)
    link = copy / "fastcfg" / "kernels"
    target = os.readlink(link)
    link.unlink()
    link.write_text(target)
    check = "from fastcfg.kernels import guided_step; print(guided_step.__file__)"
    assert run(python, "-c", kernel_imports() + check, cwd=copy) == str(copy / "kernels" / "guided_step.py")


def test_an_installed_fastcfg_takes_no_foreign_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(_moved, "_KERNELS", tmp_path)
    assert _moved._Kernels().find_spec("fastcfg.kernels", None) is None


def test_the_supported_versions_agree() -> None:
    """What setup.py requires, constraints.txt allows, `make test-oldest` runs with, and README and docs say."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "constraints.txt", "Makefile")}
    torch, triton = re.findall(r"(?:torch|triton)>=([\d.]+)", texts["setup.py"])
    ((lowest, above),) = re.findall(r"^triton>=([\d.]+),<3\.(\d+)$", texts["constraints.txt"], re.MULTILINE)
    assert lowest == triton
    assert f'"torch=={torch}.*" "triton=={triton}.*"' in texts["Makefile"]
    said = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    assert set(re.findall(r"Triton ([\d.]+) to ([\d.]+\d)", "".join(said))) == {(triton, f"3.{int(above) - 1}")}
    assert set(re.findall(r"torch ≥ ([\d.]+\d)", "".join(said))) == {torch}


def test_import_fastcfg_imports_nothing_heavy_and_starts_no_cuda() -> None:
    # torch comes first: what it imports by itself (tqdm) is not fastcfg's doing.
    check = (
        "import sys, numpy, torch; before = set(sys.modules); import fastcfg; "
        f"print(sorted((set(sys.modules) - before) & set({HEAVY!r})), torch.cuda.is_initialized())"
    )
    assert run(sys.executable, "-c", check, cwd=ROOT) == "[] False"
