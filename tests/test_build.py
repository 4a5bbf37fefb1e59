"""The build: which torch it finds, what it says when something is missing, and what it leaves in the library."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections import defaultdict
from pathlib import Path

import cmake_call
import fastlayers_build
import nvcc
import places
import pytest
import target_torch
import torch

import fastlayers as fl

ROOT = cmake_call.ROOT
PACKAGE = Path(fl.__file__).parent
LIBRARY = PACKAGE / "_C.abi3.so"
TORCH = Path(torch.__file__).parent


def make_torch(folder: Path, version: str = "2.13.0+cpu") -> Path:
    """A package that looks like torch to the build."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    return package


def make_environment(folder: Path) -> tuple[Path, Path]:
    """The interpreter and the site-packages of a new virtual environment without packages."""
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python", next(folder.glob("lib/python*/site-packages"))


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> tuple[int, str]:
    """Exit status and output, both streams, of a command with `env` added to the environment."""
    done = subprocess.run(
        command, env=os.environ | (env or {}), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def unwrapped(text: str) -> str:
    """CMake fills the lines of its messages."""
    return " ".join(text.split())


class TestTorchToBuildAgainst:
    def test_is_the_first_on_the_path(self, tmp_path: Path) -> None:
        first, second = make_torch(tmp_path / "a"), make_torch(tmp_path / "b")
        assert target_torch.find_torch([str(tmp_path), str(first.parent), str(second.parent)]) == first

    def test_is_no_folder_that_an_uninstalled_one_left(self, tmp_path: Path) -> None:
        (tmp_path / "torch" / "__pycache__").mkdir(parents=True)
        assert target_torch.find_torch([str(tmp_path)]) is None

    def test_is_that_of_the_target_environment_when_the_build_is_isolated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        python, site = make_environment(tmp_path / "target")
        expected = make_torch(site)
        monkeypatch.setattr(sys, "executable", str(python))
        # As pip isolates: the build's own packages come first, by PYTHONPATH.
        monkeypatch.setenv("PYTHONPATH", str(make_torch(tmp_path / "isolated").parent))
        assert target_torch.find_torch() == expected

    def test_is_that_of_the_active_environment_when_the_frontend_uses_another_interpreter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build_python, _ = make_environment(tmp_path / "build")
        _, site = make_environment(tmp_path / "active")
        expected = make_torch(site)
        monkeypatch.setattr(sys, "executable", str(build_python))
        monkeypatch.setenv("PATH", f"{build_python.parent}:{tmp_path}/active/bin:{os.environ['PATH']}")
        assert target_torch.find_torch() == expected

    @pytest.mark.parametrize("called_in", [".", "src/deeper"])
    def test_is_that_of_the_folder_that_uv_takes_without_being_told(
        self, tmp_path: Path, called_in: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build_python, _ = make_environment(tmp_path / "build")
        _, site = make_environment(tmp_path / "project" / ".venv")
        expected = make_torch(site)
        monkeypatch.setattr(sys, "executable", str(build_python))
        monkeypatch.setenv("PATH", f"{build_python.parent}:/usr/bin:/bin")
        # uv starts the build in the checkout and sets VIRTUAL_ENV to the build's own environment; PWD stays.
        monkeypatch.setenv("PWD", str(tmp_path / "project" / called_in))
        assert target_torch.find_torch() == expected

    def test_is_sought_only_where_this_user_may_look(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken, _ = make_environment(tmp_path / "broken")
        broken.unlink()
        broken.write_text("no program")
        broken.chmod(0o755)
        closed = tmp_path / "closed"
        closed.mkdir(mode=0)  # as root's folders on the PATH of others
        monkeypatch.setenv("PATH", f"{closed}/bin:{broken.parent}:{os.environ['PATH']}")
        assert target_torch.find_torch() == TORCH

    def test_is_found_in_a_folder_of_any_name_in_any_locale(self, tmp_path: Path) -> None:
        python, site = make_environment(tmp_path / "a wäy ñ 空")
        expected = make_torch(site)
        program = "import sys, target_torch; sys.executable = sys.argv[1]; print(ascii(str(target_torch.find_torch())))"
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT / "build_backend")}
        status, output = run(sys.executable, "-c", program, python, env=env, cwd=tmp_path)
        assert status == 0, output
        # Where the locale is ASCII, the bytes of other letters are escaped.
        assert ast.literal_eval(output) == os.fsencode(expected).decode("ascii", "surrogateescape")

    def test_is_asked_for_only_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert fastlayers_build._requirements() == []
        monkeypatch.setattr(fastlayers_build, "find_torch", lambda: None)
        assert fastlayers_build._requirements() == ["torch>=2.11"]


READ_ONLY = """
import os, sys
os.access = lambda path, mode: False  # as in a tree that this user may only read; to root all may seem open
import fastlayers_build
print(getattr(fastlayers_build, sys.argv[1])(*sys.argv[2:]))
"""

HOLDS_THE_LOCK = """
import pathlib, sys, places
with places.alone(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
"""


class TestWhereABuildWrites:
    """What setuptools and CMake write: to the checkout, one build at a time, or elsewhere where it is read-only."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        """A copy without what is compiled."""
        left_out = shutil.ignore_patterns(".*", "build", "docs", "tests", "*.egg-info", "__pycache__", "*.so")
        return Path(shutil.copytree(ROOT, tmp_path / "read only", ignore=left_out))

    def hook(self, checkout: Path, name: str, *arguments: Path) -> tuple[int, str]:
        env = {"PYTHONPATH": str(checkout / "build_backend"), "PYTHONDONTWRITEBYTECODE": "1"}
        return run(sys.executable, "-c", READ_ONLY, name, *arguments, env=env, cwd=checkout)

    @pytest.mark.parametrize("name", ["get_requires_for_build_wheel", "prepare_metadata_for_build_wheel"])
    def test_nothing_goes_into_a_read_only_checkout(self, checkout: Path, name: str, tmp_path: Path) -> None:
        arguments = [tmp_path] if name.startswith("prepare") else []
        before = sorted(checkout.rglob("*"))
        status, output = self.hook(checkout, name, *arguments)
        assert status == 0, output
        assert sorted(checkout.rglob("*")) == before
        if arguments:
            assert "Name: fastlayers" in next(tmp_path.glob("*.dist-info/METADATA")).read_text()

    @pytest.mark.parametrize(
        ("name", "what"), [("build_editable", "An editable install"), ("build_sdist", "A source distribution")]
    )
    def test_what_must_write_there_says_so(self, checkout: Path, name: str, what: str, tmp_path: Path) -> None:
        status, output = self.hook(checkout, name, tmp_path)
        assert status != 0
        assert f"{what} writes to {checkout}, which is read-only for this user" in output
        assert "Traceback" not in output

    def test_temporary_folder_is_gone_afterwards(self, checkout: Path, tmp_path: Path) -> None:
        program = (
            "import os; os.access = lambda *_: False\nimport places; print(places.SCRATCH, places.SCRATCH.is_dir())"
        )
        env = {"PYTHONPATH": str(checkout / "build_backend"), "TMPDIR": str(tmp_path)}
        status, output = run(sys.executable, "-c", program, env=env)
        folder, _, existed = output.strip().rpartition(" ")
        assert (status, existed, Path(folder).parent) == (0, "True", tmp_path)
        assert not Path(folder).exists()

    def test_one_folder_that_is_not_the_users_is_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert places.can_be_written(tmp_path)  # what does not exist yet is no obstacle
        (tmp_path / "fastlayers.egg-info").mkdir()  # after `sudo pip install`
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".egg-info"))
        assert not places.can_be_written(tmp_path)

    def test_second_build_waits_for_the_first(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path / "build")]
        env = os.environ | {"PYTHONPATH": str(ROOT / "build_backend")}
        with places.alone(tmp_path / "build"):
            with places.alone(tmp_path / "build"):  # as the hook has it, which calls CMake
                pass
            second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
            assert second.stdout is not None
            said = second.stdout.readline()
        rest, _ = second.communicate()
        assert said.startswith("Another build of fastlayers is running in ")  # else "mine"
        assert (rest, second.returncode) == ("mine\n", 0)

    def test_copied_checkout_does_not_take_the_cache_that_names_the_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, copy = tmp_path / "first", tmp_path / "copy"
        monkeypatch.setattr(cmake_call, "_settings", lambda: {"FASTLAYERS_CUDA": "0"})
        monkeypatch.setattr(cmake_call, "_run", lambda *arguments: cmake_call.BUILD_DIR.mkdir(exist_ok=True))

        def cache_after_configuring(folder: Path) -> bool:
            monkeypatch.setattr(cmake_call, "BUILD_DIR", folder)
            cmake_call._configure({})
            return (folder / "CMakeCache.txt").exists()

        assert not cache_after_configuring(first)
        (first / "CMakeCache.txt").touch()
        assert cache_after_configuring(first)
        shutil.copytree(first, copy)
        assert not cache_after_configuring(copy)

    @pytest.mark.parametrize("kind", ["build", "get_requires_for_build", "prepare_metadata_for_build"])
    @pytest.mark.parametrize("what", ["wheel", "editable", "sdist"])
    def test_every_hook_is_alone(self, kind: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if (kind, what) == ("prepare_metadata_for_build", "sdist"):
            assert not hasattr(fastlayers_build, f"{kind}_{what}")  # there is no such hook
            return

        def alone() -> None:
            raise InterruptedError("the lock is asked for")

        monkeypatch.setattr(places, "alone", alone)
        with pytest.raises(InterruptedError, match="lock"):
            getattr(fastlayers_build, f"{kind}_{what}")()


class TestMessages:
    """What the user reads when the build cannot work."""

    def configure(self, folder: Path, *options: str, **env: str) -> str:
        """What CMake says, failing, in a build folder of its own."""
        status, output = run(
            cmake_call._program("cmake"),
            *("-S", ROOT, "-B", folder / "build", "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={cmake_call._program('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTLAYERS_TORCH_ROOT={TORCH}",
            *options,
            env=env,
        )
        assert status != 0, output
        return unwrapped(output)

    @pytest.mark.parametrize(("variable", "language"), [("CC", "C"), ("CXX", "C++")])
    def test_compiler_that_does_not_work(self, tmp_path: Path, variable: str, language: str) -> None:
        output = self.configure(tmp_path, **{variable: "/bin/false"})
        assert f"no {language} compiler works here" in output
        assert "apt install g++" in output
        assert f"{variable}='/bin/false'" in output

    def test_compiler_without_cxx20(self, tmp_path: Path) -> None:
        compiler = tmp_path / "old-c++"
        compiler.write_text('#!/bin/sh\ncase "$*" in *c++20*|*c++2a*) exit 1;; esac\nexec c++ "$@"\n')
        compiler.chmod(0o755)
        output = self.configure(tmp_path, CXX=str(compiler))
        assert f"C++20, which {compiler}" in output
        assert "g++ 11 or clang 14" in output

    def test_torch_too_old(self, tmp_path: Path) -> None:
        old = make_torch(tmp_path, "2.9.1+cu128")
        output = self.configure(tmp_path, f"-DFASTLAYERS_TORCH_ROOT={old}")
        assert "needs torch 2.11 or newer; found torch 2.9.1+cu128" in output
        assert 'pip install --upgrade "torch>=2.11"' in output

    def test_no_torch(self, tmp_path: Path) -> None:
        output = self.configure(tmp_path, f"-DFASTLAYERS_TORCH_ROOT={tmp_path}")
        assert f"FASTLAYERS_TORCH_ROOT='{tmp_path}' is no torch package" in output

    def test_cuda_demanded_where_it_cannot_be(self, tmp_path: Path) -> None:
        output = self.configure(tmp_path, "-DFASTLAYERS_CUDA=1", CUDACXX="/bin/false")
        assert "FASTLAYERS_CUDA=1 asks for CUDA kernels, but" in output

    def test_unknown_value_of_fastlayers_cuda(self, tmp_path: Path) -> None:
        output = self.configure(tmp_path, "-DFASTLAYERS_CUDA=yes")
        assert "FASTLAYERS_CUDA='yes': allowed are auto (CUDA kernels where nvcc works), 0 and 1" in output

    def test_unsupported_platform(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(SystemExit, match="cannot be built on darwin"):
            fastlayers_build._requirements()

    @pytest.mark.parametrize("value", ["0", "-1", "many"])
    def test_bad_max_jobs(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("MAX_JOBS", value)
        with pytest.raises(SystemExit, match=f"MAX_JOBS='{value}': a positive number"):
            cmake_call._jobs()

    def test_missing_build_tool(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SystemExit, match="no-such-tool is missing: pip install no-such-tool"):
            cmake_call._program("no-such-tool")


class TestNvcc:
    """Which nvcc compiles the kernels, and when pip is asked for one."""

    PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")

    @pytest.fixture
    def without_toolkit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FASTLAYERS_CUDA", raising=False)
        monkeypatch.setattr(nvcc, "system_nvcc", lambda: None)

    def torch(self, folder: Path, cuda: str | None) -> Path:
        package = make_torch(folder)
        with (package / "version.py").open("a") as file:
            file.write(f"debug = False\ncuda: Optional[str] = {cuda!r}\ngit_version = 'cuda'\n")
        return package

    @pytest.mark.parametrize("cuda", ["13.0", "13.2", "14.1"])
    @pytest.mark.usefixtures("without_toolkit")
    def test_is_that_of_torchs_cuda(self, tmp_path: Path, cuda: str) -> None:
        expected = [f"{package}=={cuda}.*" for package in self.PACKAGES]
        assert nvcc.requirements(self.torch(tmp_path, cuda)) == expected

    @pytest.mark.usefixtures("without_toolkit")
    def test_is_not_asked_for_where_there_is_none(self, tmp_path: Path) -> None:
        assert nvcc.requirements(self.torch(tmp_path, "12.8")) == []

    @pytest.mark.usefixtures("without_toolkit")
    def test_is_not_asked_for_beside_a_torch_for_cpu(self, tmp_path: Path) -> None:
        assert nvcc.requirements(self.torch(tmp_path, None)) == []
        assert nvcc.requirements(None) == []

    @pytest.mark.usefixtures("without_toolkit")
    def test_is_asked_for_where_the_kernels_are_demanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTLAYERS_CUDA", "1")
        assert nvcc.requirements(self.torch(tmp_path, None)) == [f"{package}==13.0.*" for package in self.PACKAGES]

    @pytest.mark.usefixtures("without_toolkit")
    def test_is_not_asked_for_where_the_kernels_are_not_wanted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FASTLAYERS_CUDA", "0")
        assert nvcc.requirements(self.torch(tmp_path, "13.0")) == []

    def test_is_not_asked_for_where_there_is_a_toolkit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDACXX", str(self.make_nvcc(tmp_path / "toolkit")))
        assert nvcc.requirements(self.torch(tmp_path, "13.0")) == []

    def make_nvcc(self, folder: Path) -> Path:
        program = folder / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
        return program

    @pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "PATH"])
    def test_of_the_system_is_found(self, tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("CUDACXX", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        program = self.make_nvcc(tmp_path)
        monkeypatch.setenv(variable, str({"CUDACXX": program, "CUDA_HOME": tmp_path, "PATH": program.parent}[variable]))
        assert nvcc.system_nvcc() == program

    def test_of_pip_is_found(self, tmp_path: Path) -> None:
        old, new = (self.make_nvcc(tmp_path / "site" / "nvidia" / name) for name in ("cu9", "cu13"))
        assert nvcc.installed_by_pip([str(tmp_path), str(tmp_path / "site")]) == new != old
        assert nvcc.installed_by_pip([str(tmp_path)]) is None


class TestCudaArchitectures:
    def parse(self, folder: Path, value: str, nvcc: str = "13.0") -> tuple[int, str]:
        script = folder / "parse.cmake"
        script.write_text(
            f'include("{ROOT}/cmake/CudaArchs.cmake")\n'
            f'fastlayers_cuda_archs(archs "{value}" {nvcc})\n'
            'message(NOTICE "${archs}")\n'
        )
        return run(cmake_call._program("cmake"), "-P", script)

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("8.0", "80-real"),
            ("8.0;9.0+PTX", "80-real;90"),
            ("7.5 8.6,10.0+PTX", "75-real;86-real;100"),
            ("9.0a;12.0f", "90a-real;120f-real"),
            ("", "75-real;80-real;90-real;100-real;120"),
        ],
    )
    def test_torch_syntax(self, tmp_path: Path, value: str, expected: str) -> None:
        assert self.parse(tmp_path, value) == (0, expected + "\n")

    def test_default_leaves_out_what_an_older_nvcc_does_not_know(self, tmp_path: Path) -> None:
        assert self.parse(tmp_path, "", nvcc="12.4") == (0, "75-real;80-real;90\n")

    def test_bad_entry(self, tmp_path: Path) -> None:
        status, output = self.parse(tmp_path, "8.0;Hopper")
        assert status != 0
        assert "TORCH_CUDA_ARCH_LIST: 'Hopper' is not a compute capability" in unwrapped(output)


class TestLibraryThatDoesNotLoad:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        """A copy of the package, without the library."""
        copy = tmp_path / "fastlayers"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        return copy

    def error(self, package: Path, before: str = "") -> str:
        """How `import fastlayers` fails."""
        program = f"import torch; {before}\nimport fastlayers"
        status, output = run(sys.executable, "-c", program, env={"PYTHONPATH": str(package.parent)}, cwd=package.parent)
        assert status != 0
        assert "ImportError: fastlayers cannot load its compiled library" in output
        assert f"installed torch: {torch.__version__}" in output or before
        return output

    def test_missing(self, package: Path) -> None:
        output = self.error(package)
        assert "_C.abi3.so: cannot open shared object file" in output
        assert f"built against:   torch {fl.ops.build_info()['torch_built_against']}, for torch >= 2.11" in output
        assert "pip install --force-reinstall --no-cache-dir --no-deps fastlayers" in output

    def test_never_built(self, package: Path) -> None:
        (package / "build_info.json").unlink()
        (package.parent / "CMakeLists.txt").touch()
        output = self.error(package)
        assert "never built" in output
        assert f'cd "{package.parent}" && pip install -e .' in output

    def test_corrupted(self, package: Path) -> None:
        (package / LIBRARY.name).write_bytes(b"no library" * 1000)
        assert f"{LIBRARY.name}: invalid ELF header" in self.error(package)

    def test_torch_too_old(self, package: Path) -> None:
        output = self.error(package, before="torch.__version__ = '2.9.1'")
        assert "installed torch: 2.9.1" in output
        assert 'to mend it:      pip install --upgrade "torch>=2.11"' in output


class TestWhatWasBuilt:
    def test_build_info(self) -> None:
        info = fl.ops.build_info()
        assert info["torch_target"] == "2.11"
        assert torch.torch_version.TorchVersion(info["torch_built_against"]) >= info["torch_target"]
        assert "baseline" in info["isas"]
        assert info["compiler"].split()[0] in ("GNU", "Clang")
        assert bool(info["cuda"]) != bool(info["why_no_cuda"])

    def test_version(self) -> None:
        assert importlib.metadata.version("fastlayers") == fl.__version__

    def test_stable_abi_is_all_that_is_used_of_torch(self) -> None:
        status, symbols = run(tool("nm"), "-D", "--undefined-only", LIBRARY)
        assert status == 0
        assert "aoti_torch" in symbols
        # C++ names of at::, c10::, caffe2:: and torch::, which differ from one torch to the next.
        unstable = [s for s in symbols.split() if s.startswith(("_ZN2at", "_ZN3c10", "_ZN6caffe2", "_ZN5torch"))]
        assert unstable == []

    def test_own_symbols_stay_inside(self) -> None:
        status, symbols = run(tool("nm"), "-D", "--defined-only", LIBRARY)
        assert status == 0
        assert "PyInit__C" in symbols
        assert [s for s in symbols.split() if "fastlayers" in s or "cuda" in s] == []

    def test_library_is_tied_to_no_path(self) -> None:
        status, dynamic = run(tool("readelf"), "-d", LIBRARY)
        assert status == 0
        assert "libtorch.so" in dynamic
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic

    def test_source_distribution_is_complete(self, tmp_path: Path) -> None:
        program = "import sys, fastlayers_build; fastlayers_build.build_sdist(sys.argv[1])"
        env = {"PYTHONPATH": str(ROOT / "build_backend")}
        status, output = run(sys.executable, "-c", program, tmp_path, env=env, cwd=ROOT)
        assert status == 0, output
        with tarfile.open(next(tmp_path.glob("fastlayers-*.tar.gz"))) as archive:
            packed = {name.partition("/")[2] for name in archive.getnames()}
        folders = ("benchmarks", "build_backend", "cmake", "csrc", "fastlayers", "tests")
        made = ("_C.abi3.so", "build_info.json")
        files = {str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.*") if p.is_file()}
        missing = {f for f in files - packed if "__pycache__" not in f and not f.endswith(made)}
        assert missing == set()
        assert not any(f.endswith(made) for f in packed)
        assert {"CMakeLists.txt", "LICENSE", "README.md", "setup.py", "pyproject.toml"} <= packed


class TestInstructionSetsStayApart:
    """The linker keeps one of several weak definitions of a name: a wrong pick runs code that the processor lacks."""

    # Compiler helpers that end the program; they hold no vector instruction.
    HARMLESS = ("__clang_call_terminate", "DW.ref.__gxx_personality_v0")

    @pytest.mark.parametrize("isa", fl.ops.build_info()["isas"])
    def test_weak_symbols(self, isa: str) -> None:
        objects = list(cmake_call.BUILD_DIR.glob(f"CMakeFiles/fastlayers_cpu_{isa}_*.dir/**/*.o"))
        if not objects:
            pytest.skip(f"no object files in {cmake_call.BUILD_DIR}: fastlayers was not built in this checkout")
        sizes = defaultdict(set)
        for path in objects:
            for name, size in weak_symbols(path):
                sizes[name, path.name].add(size)
        # The namespace as it is in mangled names: its length, then itself.
        outside = [name for name, _ in sizes if f"{len(isa)}{isa}" not in name and name not in self.HARMLESS]
        assert outside == []
        # One name with different code where one file is compiled for different storage types: the alias that it depends
        # on is not in the name. Elsewhere it is the same code, inlined differently.
        assert {name: size for name, size in sizes.items() if len(size) > 1} == {}


def weak_symbols(path: Path) -> list[tuple[str, str]]:
    """Mangled name and size of each weak definition in an object file."""
    status, output = run(tool("nm"), "--defined-only", "--print-size", path)
    assert status == 0, output
    fields = [line.split() for line in output.splitlines()]
    return [(f[3], f[1]) for f in fields if len(f) == 4 and f[2] in "WwVvu"]


def tool(name: str) -> str:
    """Path of a program of binutils, without which nothing here was compiled."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return path
