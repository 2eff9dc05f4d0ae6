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
from fastcfg.ops.extension import build_problem

KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
C_SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "cpu").iterdir()}
COMPILES = not build_problem()
EXTENSION = {"fastcfg/kernels/_native.abi3.so"} if COMPILES else set()
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


def run(*command: object, cwd: Path, **settings: str) -> str:
    """Standard output of a command that must succeed, run without settings of this process that could help it."""
    dropped = {"PYTHONPATH", "TRITON_INTERPRET", "FASTCFG_NATIVE"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | settings
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
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    return copy


def build_wheel(source: Path, out: Path, **settings: str) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--wheel-dir", out]
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out, **settings)
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
def plain_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, where no program is found: without a C compiler."""
    folder = tmp_path_factory.mktemp("plain")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return build_wheel(source, folder, PATH=os.devnull, CC="cc")


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


def info_of(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def test_wheel_holds_the_kernels_under_fastcfg_and_nothing_at_the_top(wheel: Path) -> None:
    names = names_in(wheel)
    kernels = {f"fastcfg/kernels/{name}" for name in KERNELS} | EXTENSION
    assert {name for name in names if name.startswith("fastcfg/kernels/")} == kernels
    assert {name.split("/")[0] for name in names} == {"fastcfg", info_of(wheel)}


def test_wheel_holds_every_module_the_typing_marker_and_the_checkpoint(wheel: Path) -> None:
    names = names_in(wheel)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastcfg").rglob("*.py")}
    assert modules <= names
    assert "fastcfg/py.typed" in names
    assert {f"fastcfg/checkpoints/{name}" for name in CHECKPOINT_FILES} <= names


def test_wheel_names_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = info_of(wheel)
        assert "fastcfg = fastcfg.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert 'Requires-Dist: triton>=3.4; sys_platform == "linux"' in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_sdist_holds_the_c_sources_and_the_kernels_once(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert not [name for name in names if name.startswith("fastcfg/kernels/")]
    assert {name for name in names if name.startswith("kernels/cpu/")} == C_SOURCES


def test_wheel_built_from_the_sdist_without_a_compiler_lacks_the_extension_alone(
    plain_wheel: Path, wheel: Path
) -> None:
    assert names_in(plain_wheel) == names_in(wheel) - EXTENSION


def test_a_wheel_is_tagged_by_what_it_holds(plain_wheel: Path, wheel: Path) -> None:
    for path, pure in ((plain_wheel, True), (wheel, not COMPILES)):
        with zipfile.ZipFile(path) as archive:
            said = archive.read(f"{info_of(path)}/WHEEL").decode()
        tag = path.stem.split("-", 2)[2]
        assert re.fullmatch("py3-none-any" if pure else r"cp310-abi3-(?!any)\w+", tag)
        assert re.findall("^Tag: (.+)$", said, re.MULTILINE) == [tag]
        assert f"Root-Is-Purelib: {str(pure).lower()}\n" in said


@pytest.mark.parametrize("built", [pytest.param("wheel", id="here"), pytest.param("plain_wheel", id="no-compiler")])
def test_installed_wheel_imports_and_leaves_the_name_kernels_free(
    built: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "venv")
    with zipfile.ZipFile(request.getfixturevalue(built)) as archive:
        archive.extractall(site_packages(python))
    check = "import importlib.util as u, fastcfg, fastcfg.ops as o; print(u.find_spec('kernels'), fastcfg.__file__); "
    out = run(python, "-c", kernel_imports() + check + "print(*o.instruction_sets())", cwd=tmp_path)
    spec, file, *sets = out.split()
    assert spec == "None"
    assert Path(file) == site_packages(python) / "fastcfg" / "__init__.py"
    assert bool(sets) == (COMPILES and built == "wheel")


@pytest.mark.parametrize("settings", [{"PATH": os.devnull, "CC": "cc"}, {"FASTCFG_NATIVE": "0"}])
def test_an_extension_of_an_earlier_build_is_not_packed_where_the_compiler_fails_or_is_not_asked(
    settings: dict[str, str], wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    source = checkout / "kernels" / "cpu" / "native.c"
    before = source.stat()
    source.touch()
    again = build_wheel(checkout, tmp_path, **settings)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert names_in(again) == names_in(wheel) - EXTENSION


def test_editable_install_imports_the_checkout_and_leaves_the_name_kernels_free(
    editable: Path, checkout: Path, tmp_path: Path
) -> None:
    check = "import importlib.util as u, fastcfg, fastcfg.ops as o; print(u.find_spec('kernels'), fastcfg.__file__); "
    out = run(editable, "-c", kernel_imports() + check + "print(*o.instruction_sets())", cwd=tmp_path)
    spec, file, *sets = out.split()
    assert spec == "None"
    assert Path(file) == checkout / "fastcfg" / "__init__.py"
    assert bool(sets) == COMPILES


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
