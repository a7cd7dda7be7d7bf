# SPDX-License-Identifier: Apache-2.0
"""The build: what is in the binary, what the backend asks for, what the source distribution holds, what info prints."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from dynamic_moe import _C, info

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = Path(_C.__file__)
LEVELS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]


def load(path: Path) -> ModuleType:
    """Import a script that lies outside every package."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


backend = load(ROOT / "build_support" / "build_backend.py")
compile_flags = load(ROOT / "build_support" / "compile_flags.py")
make_venv = load(ROOT / "build_support" / "make_venv.py")
cuda_toolkit = load(ROOT / "build_support" / "cuda_toolkit.py")
run_all = load(ROOT / "tests" / "run_all.py")


def output(*command: str | Path, **options) -> str:
    return subprocess.run(list(command), capture_output=True, text=True, check=True, **options).stdout


@pytest.mark.level_independent
class TestBinary:
    def test_links_libtorch_cpu_and_no_cuda_library(self):
        needed = re.findall(r"NEEDED.*\[(\S+?)\]", output("readelf", "--dynamic", EXTENSION))
        assert "libtorch_cpu.so" in needed
        assert not [name for name in needed if re.search(r"cuda|c10|torch_python|libpython", name)]

    def test_exports_its_entry_point_only(self):
        symbols = output("nm", "--dynamic", "--defined-only", "--format=just-symbols", EXTENSION).split()
        assert symbols == ["PyInit__C"]

    def test_names_no_folder_of_the_machine_that_built_it(self):
        content = EXTENSION.read_bytes()
        folders = [str(folder) for folder in (ROOT, Path(torch.__file__).parent, Path.home()) if len(folder.parts) > 1]
        assert [folder for folder in folders if f"{folder}/".encode() in content] == []

    def test_build_info_agrees_with_the_package(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        build = _C.build_info()
        assert build["version"] == project["version"] == metadata.version("dynamic_moe")
        assert f"torch>={build['torch_target']}" in project["dependencies"]
        assert build["cxx_standard"] >= 202002
        assert re.match(r"(gcc|clang) \d+\.", build["compiler"])
        assert build["cuda_architectures"] == _C.cuda_architectures()
        assert (build["cuda"] is None) == (build["cuda_architectures"] == [])


class TestCpuLevels:
    def test_the_best_tested_level_is_used_unless_the_variable_names_one(self):
        supported = _C.supported_cpu_isas()
        assert supported[0] == "scalar"
        assert supported == [name for name in _C.build_info()["cpu_isas"] if name in supported]
        default = "amx" if "amx" in supported else _C.amx_tiles()["bfloat16_isa_when_refused"]
        assert _C.cpu_isa() == (os.environ.get("DYNAMIC_MOE_CPU_ISA") or default)

    def test_set_cpu_isa_changes_the_level(self):
        before = _C.cpu_isa()
        try:
            for name in _C.supported_cpu_isas(ask=True):
                _C.set_cpu_isa(name)
                assert _C.cpu_isa() == name
                assert _C.cpu_isa_for("bfloat16") == _C.cpu_isa_for("float16") == name
        finally:
            _C.set_cpu_isa(None)
        assert _C.cpu_isa() == before

    def test_set_cpu_isa_names_what_it_takes(self):
        with pytest.raises(ValueError, match=r"^isa must be one of scalar, .*, got 'sse'$"):
            _C.set_cpu_isa("sse")
        for name in set(LEVELS) - set(_C.supported_cpu_isas()):
            with pytest.raises(ValueError, match=rf"^isa must be a level that .* support \(scalar.*\), got '{name}'$"):
                _C.set_cpu_isa(name)

    def test_an_unknown_level_in_the_variable_stops_the_import(self):
        environment = os.environ | {"DYNAMIC_MOE_CPU_ISA": "sse"}
        command = [sys.executable, "-c", "import torch, dynamic_moe._C"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "ImportError: DYNAMIC_MOE_CPU_ISA must be one of scalar, " in result.stderr
        assert "got 'sse'" in result.stderr

    def test_the_table_of_flags_names_every_level_worst_first(self):
        assert list(compile_flags.flag_table()) == ["base", *LEVELS]
        assert compile_flags.flag_table()["scalar"] == []
        assert list(compile_flags.compiled_levels()) == _C.build_info()["cpu_isas"]

    def test_no_flag_ties_the_build_to_this_machine_or_loosens_arithmetic(self):
        flags = [flag for row in compile_flags.flag_table().values() for flag in row] + compile_flags.base_flags()
        assert not [
            flag for flag in flags if re.match(r"-march|-mtune|-ffast-math|-Ofast|-funsafe|-fassociative", flag)
        ]

    def test_a_file_is_compiled_for_the_level_in_its_name(self):
        names = {
            "a_cpu_avx512.cpp": "avx512",
            "a_cpu_avx512_bf16.cpp": "avx512_bf16",
            "a_cpu_scalar.cpp": "scalar",
            "a_cpu_amx.cpp": "amx",
            "a_cpu.cpp": None,
            "a_avx2.cpp": None,
            "a_cpu_neon.cpp": None,
        }
        assert {name: compile_flags.level_of(Path(name)) for name in names} == names

    def test_every_kernel_file_has_a_known_level(self):
        files = [path.name for path in (ROOT / "csrc").rglob("*_cpu_*.cpp")]
        assert files
        assert [name for name in files if compile_flags.level_of(Path(name)) is None] == []

    @pytest.mark.parametrize(
        ("code", "weak"),
        [
            ("template <class T> __attribute__((noinline)) T f(T x) { return x; }\nint g() { return f(2); }", 1),
            ("inline int counter = 0;\nint& f() { return counter; }", 1),
            ("namespace { int f() { return 1; } }\nextern int g();\nint h() { return f() + g(); }", 0),
        ],
        ids=["inline function", "inline variable", "none"],
    )
    def test_weak_symbols_in_the_object_of_a_level_are_noticed(self, tmp_path, code, weak):
        (tmp_path / "a.cpp").write_text(code)
        subprocess.run([*compile_flags.compiler(), "-std=c++20", "-O0", "-c", "a.cpp"], cwd=tmp_path, check=True)
        script = ROOT / "tests" / "cpp" / "check_level_objects.py"
        command = [sys.executable, script, "nm", tmp_path / "a.o"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == (1 if weak else 0)
        assert result.stdout.splitlines()[-1] == f"1 objects, {weak} weak symbols"


@pytest.mark.level_independent
class TestTilePlans:
    @pytest.mark.parametrize("isa", LEVELS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_tile_is_whole_vectors_and_fits_the_registers(self, isa, dtype):
        plan = _C.tile_plan(isa, dtype)
        assert plan["lanes"] == {"scalar": 1, "avx2": 8}.get(isa, 16)
        assert plan["columns"] % plan["lanes"] == 0
        vectors = plan["columns"] // plan["lanes"]
        # Sums, a vector of each column and a broadcast word; AMX has its own registers for the sums, 16 rows each.
        registers = 16 if isa in ("scalar", "avx2") else 32
        in_tiles = isa == "amx" and plan["multiplies_pairs"]
        assert plan["rows"] <= 16 if in_tiles else plan["rows"] * vectors + vectors + 1 <= registers
        assert plan["multiplies_pairs"] == (dtype == "bfloat16" and isa in ("avx512_bf16", "amx"))
        assert 0 < plan["column_block_words"] <= plan["block_words"]
        assert plan["few_rows"] >= 0
        assert 1 <= plan["spread_dot_rows"] <= plan["dot_rows"]

    def test_names_what_it_takes(self):
        with pytest.raises(ValueError, match=r"^isa must be one of scalar, .*, got 'sse'$"):
            _C.tile_plan("sse", "float32")
        with pytest.raises(ValueError, match=r"^dtype must be one of float32, bfloat16, float16, got 'float64'$"):
            _C.tile_plan("scalar", "float64")


@pytest.mark.level_independent
class TestCudaToolkit:
    @pytest.fixture
    def folder(self, monkeypatch, tmp_path):
        """Return a folder that looks like a toolkit, which alone is to be found."""
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "cuda_runtime.h").touch()
        monkeypatch.delenv("DYNAMIC_MOE_CUDA", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return tmp_path

    def test_is_found_unless_it_is_not_wanted(self, monkeypatch, folder):
        assert cuda_toolkit.cuda_toolkit() == folder
        assert cuda_toolkit.nvcc_version(folder) == "13.1"
        monkeypatch.setenv("DYNAMIC_MOE_CUDA", "0")
        assert cuda_toolkit.cuda_toolkit() is None

    def test_a_compiler_without_headers_is_none(self, monkeypatch, folder):
        (folder / "include" / "cuda_runtime.h").unlink()
        monkeypatch.setattr(cuda_toolkit, "PLACES", ())
        monkeypatch.setattr(cuda_toolkit.shutil, "which", lambda _: None)
        assert cuda_toolkit.cuda_toolkit() is None
        monkeypatch.setenv("DYNAMIC_MOE_CUDA", "1")
        with pytest.raises(RuntimeError, match="no CUDA toolkit was found; set CUDA_HOME"):
            cuda_toolkit.cuda_toolkit()

    def test_the_variable_is_checked(self, monkeypatch):
        monkeypatch.setenv("DYNAMIC_MOE_CUDA", "yes")
        with pytest.raises(ValueError, match=r"^DYNAMIC_MOE_CUDA must be 0, 1 or unset, got 'yes'$"):
            cuda_toolkit.cuda_toolkit()

    @pytest.mark.parametrize(
        ("known", "architectures"),
        [
            ("75 80 86 87 88 89 90 100 110 103 120 121", "8.0+PTX;9.0;10.0;11.0;12.0+PTX"),  # 13.0
            ("50 75 80 86 87 89 90 100 101 120", "8.0+PTX;9.0;10.0+PTX;12.0+PTX"),  # 12.8
            ("50 75 80 86 87 89 90", "8.0+PTX;9.0+PTX"),  # 12.0
            ("90 100 110 120 130", "9.0;10.0;11.0;12.0+PTX"),  # one day
        ],
    )
    def test_every_toolkit_compiles_what_it_knows_and_ptx_for_the_rest(self, known, architectures, monkeypatch):
        assert cuda_toolkit.architecture_list(set(known.split())) == architectures
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        flags = []
        for name in architectures.split(";"):
            number = name.removesuffix("+PTX").replace(".", "")
            codes = [f"sm_{number}", *([f"compute_{number}"] if name.endswith("+PTX") else [])]
            flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        assert sorted(flags) == cpp_extension._get_cuda_arch_flags()

    def test_nvcc_is_asked_what_it_knows(self, folder):
        nvcc = folder / "bin" / "nvcc"
        nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && printf "compute_75\\ncompute_80\\ncompute_90\\n"\n')
        assert cuda_toolkit.cuda_architectures(folder) == "8.0+PTX;9.0+PTX"
        nvcc.write_text("#!/bin/sh\necho compute_75\n")
        with pytest.raises(RuntimeError, match="nvcc must know one of"):
            cuda_toolkit.cuda_architectures(folder)


@pytest.mark.level_independent
class TestBackend:
    @staticmethod
    def install(folder: Path, version: str) -> Path:
        """Put down what the backend looks for of an installed torch."""
        (folder / "torch" / "include").mkdir(parents=True)
        (folder / f"torch-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        (folder / f"torch-{version}.dist-info" / "METADATA").write_text(text)
        return folder

    @staticmethod
    def look_in(monkeypatch, *folders: Path) -> None:
        monkeypatch.setattr(backend, "candidate_folders", lambda: iter(folders))
        monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda _: ["from setuptools"])

    def test_asks_for_no_torch_where_one_is_installed(self, monkeypatch, tmp_path):
        self.look_in(monkeypatch, tmp_path / "empty", self.install(tmp_path / "full", "2.13.0+cpu"))
        assert backend.installed_torch() == tmp_path / "full"
        assert backend.get_requires_for_build_wheel() == ["from setuptools"]
        assert backend.get_requires_for_build_editable() == ["from setuptools"]

    @pytest.mark.parametrize("version", ["2.12.1", "1.13.0", None])
    def test_asks_for_torch_where_there_is_none_or_an_old_one(self, monkeypatch, tmp_path, version):
        if version:
            self.install(tmp_path, version)
        self.look_in(monkeypatch, tmp_path)
        assert backend.get_requires_for_build_wheel() == ["from setuptools", "torch>=2.13"]

    def test_puts_the_installed_torch_last_on_the_path_and_once(self, monkeypatch, tmp_path):
        self.look_in(monkeypatch, self.install(tmp_path, "3.0.0"))
        monkeypatch.setattr(sys, "path", ["first"])
        backend.use_installed_torch()
        backend.use_installed_torch()
        assert sys.path == ["first", str(tmp_path)]

    def test_looks_into_the_target_then_into_the_active_environment(self, monkeypatch, tmp_path):
        monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
        folders = list(backend.candidate_folders())
        assert folders[0] == Path(sysconfig.get_paths()["purelib"])
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        assert tmp_path / "lib" / version / "site-packages" in folders

    @pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False)])
    def test_knows_environments_that_see_the_system_s_packages(self, tmp_path, value, expected):
        (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = {value}\n")
        assert backend.sees_system_packages(tmp_path) is expected
        assert backend.sees_system_packages(tmp_path / "nothing") is False

    def test_source_distribution_holds_what_builds_and_tests_the_package(self, tmp_path):
        ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info")
        shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
        code = "import sys; sys.path.insert(0, 'build_support'); import build_backend as b; b.build_sdist(sys.argv[1])"
        # -P and a path without torch: source distributions are made in environments that have none.
        hidden = "import sys; sys.modules['torch'] = None; "
        output(sys.executable, "-c", hidden + code, tmp_path, cwd=tmp_path / "tree")
        (archive,) = tmp_path.glob("dynamic_moe-*.tar.gz")
        with tarfile.open(archive) as file:
            names = {name.partition("/")[2] for name in file.getnames()}
        folders = ["build_support", "cmake", "csrc", "dynamic_moe", "requirements", "tests"]
        wanted = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*")}
        wanted = {
            name for name in wanted if (ROOT / name).is_file() and not re.search(r"\.(so|pyc)$|__pycache__", name)
        }
        wanted |= {
            "setup.py",
            "pyproject.toml",
            "LICENSE",
            "README.md",
            "Makefile",
            "CMakeLists.txt",
            "CMakePresets.json",
        }
        assert wanted - names == set()
        assert [name for name in names if re.search(r"\.(so|o|pyc)$|\.venv|^build/", name)] == []


@pytest.mark.level_independent
class TestEnvironment:
    @pytest.fixture
    def folder(self, monkeypatch, tmp_path):
        """Return the site-packages of an empty ``.venv``."""
        monkeypatch.setattr(make_venv, "FOLDER", tmp_path)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (tmp_path / "lib" / version / "site-packages").mkdir(parents=True)
        return tmp_path / "lib" / version / "site-packages"

    def test_reuses_the_torch_of_the_caller(self, folder):
        torch_folder = str(Path(torch.__file__).resolve().parent.parent)
        assert make_venv.reused_torch() == torch_folder
        assert (folder / "reused_torch.pth").read_text() == f"{torch_folder}\n"
        assert make_venv.reused_torch() == torch_folder

    def test_keeps_a_torch_of_its_own(self, folder):
        (folder / "torch").mkdir()
        assert make_venv.reused_torch() is None
        assert not (folder / "reused_torch.pth").exists()

    def test_does_not_reuse_an_old_torch(self, folder, monkeypatch):
        monkeypatch.setattr(make_venv.metadata, "version", lambda _: "2.12.1")
        assert make_venv.reused_torch() is None
        assert not (folder / "reused_torch.pth").exists()

    def test_forgets_a_torch_that_has_gone(self, folder, monkeypatch, tmp_path):
        (folder / "reused_torch.pth").write_text(str(tmp_path / "gone"))
        monkeypatch.setattr(make_venv.util, "find_spec", lambda _: None)
        assert make_venv.reused_torch() is None
        assert not (folder / "reused_torch.pth").exists()

    def test_does_not_mix_versions_of_python(self, monkeypatch, tmp_path):
        monkeypatch.setattr(make_venv, "FOLDER", tmp_path)
        (tmp_path / "lib" / "python3.8" / "site-packages").mkdir(parents=True)
        assert make_venv.reused_torch() is None


@pytest.mark.level_independent
class TestSummary:
    REPORT = (
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c"><failure/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>'
    )

    def test_counts_what_the_report_says(self, tmp_path):
        (tmp_path / "report.xml").write_text(self.REPORT)
        result = run_all.outcome("x", tmp_path / "report.xml", 1, 0)
        assert (result.passed, result.failed, result.skipped) == (1, 2, 1)

    @pytest.mark.parametrize(
        ("report", "status"),
        [(None, 0), (None, 2), ("<testsuite/>", 0), ('<testsuite><testcase name="a"/></testsuite>', 1)],
        ids=["no report", "crash", "nothing ran", "failed outside of a test"],
    )
    def test_what_did_not_run_did_not_pass(self, tmp_path, report, status):
        if report:
            (tmp_path / "report.xml").write_text(report)
        assert run_all.outcome("x", tmp_path / "report.xml", status, 0).failed == 1

    def test_one_failure_fails_the_whole(self, capsys):
        good, bad = run_all.Outcome("good", 5, 0, 1, 2.0), run_all.Outcome("bad", 3, 1, 0, 2.0)
        assert run_all.summary([good]) == 0
        assert run_all.summary([good, bad], "amx was left out") == 1
        assert capsys.readouterr().out.endswith("amx was left out\n8 passed, 1 failed\n")

    @pytest.mark.parametrize("state", ["granted", "refused"])
    def test_a_level_whose_tiles_are_refused_is_left_out_and_said(self, monkeypatch, state):
        levels = ["scalar", "amx"] if state == "granted" else ["scalar"]
        answer = json.dumps([levels, {"state": state, "reason": "a reason"}])
        monkeypatch.setattr(run_all.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=answer))
        left_out = "amx was left out, its tiles are refused: a reason" if state == "refused" else ""
        assert run_all.runnable_levels() == (levels[::-1], left_out)


class TestInfo:
    def test_says_what_is_installed_and_what_it_runs_on(self):
        text = output(sys.executable, "-m", "dynamic_moe.info", cwd=ROOT)
        rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())
        assert rows["dynamic_moe"].startswith(_C.build_info()["version"])
        assert rows["torch"].startswith(torch.__version__)
        assert rows["CPU level"].startswith(f"{_C.cpu_isa()} (supported here: scalar")
        assert set(rows) == {
            *("dynamic_moe", "Python", "torch", "OS", "processor", "threads", "CPU level", "AMX tiles", "CUDA kernels"),
            *("confirmed on", "GPU"),
        }
        assert rows["AMX tiles"] == info.tiles_text(info.collect(ask_for_tiles=True))

    def test_json_is_what_collect_returns(self, capsys):
        info.main(["--json"])
        assert json.loads(capsys.readouterr().out) == info.collect()

    @pytest.mark.parametrize(
        ("state", "reason", "level", "text"),
        [
            ("not on this processor", None, "avx2", "not on this processor"),
            ("not asked for yet", None, "amx", "not asked for yet"),
            ("granted", None, "amx", "granted"),
            ("refused", "a reason", "avx2", "refused: a reason"),
            ("refused", "a reason", "amx", "refused: a reason; bfloat16 at avx512, or an error where amx was forced"),
        ],
    )
    def test_says_whether_tiles_may_be_used(self, state, reason, level, text):
        found = info.collect()
        found["amx_tiles"] = {"state": state, "reason": reason, "bfloat16_isa_when_refused": "avx512"}
        found["cpu_isa"] = level
        assert re.search(rf"^AMX tiles +{text}$", info.as_text(found), re.MULTILINE)

    def test_says_so_if_there_are_no_cuda_kernels_and_no_gpu(self):
        found = info.collect()
        found["gpus"] = []
        found["dynamic_moe"] |= {"cuda": None, "cuda_architectures": []}
        assert re.search(r"^CUDA kernels +none in this build$", info.as_text(found), re.MULTILINE)
        assert re.search(r"^GPU +none seen$", info.as_text(found), re.MULTILINE)

    def test_names_cuda_architectures_and_gpus(self):
        found = info.collect()
        found["gpus"] = [{"name": "NVIDIA H200", "compute_capability": "9.0", "memory_gib": 139.8}]
        found["dynamic_moe"] |= {"cuda": "13.0", "cuda_architectures": ["8.0", "12.0+PTX"]}
        assert "for 8.0, 12.0+PTX (CUDA 13.0)" in info.as_text(found)
        assert "NVIDIA H200 (compute capability 9.0, 139.8 GiB)" in info.as_text(found)


def test_hooks_of_commits_use_the_versions_of_make_lint() -> None:
    pins = (ROOT / "requirements" / "lint.txt").read_text().split()
    hooks = re.findall(r"additional_dependencies: \[(.+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == {pin for pin in pins if pin.startswith(("ruff==", "clang-format=="))}


def test_what_is_checked_follows_from_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    check = load(ROOT / "tests" / "check.py")
    folders = ["common", "gating", "permutation"]
    assert check.commands(["README.md"], folders, "avx2") == {}
    python = check.commands(["dynamic_moe/layer.py"], folders, "avx2")
    assert list(python) == ["ruff", "ruff format", "mypy", "pytest"]
    kernel = check.commands(["csrc/gating/x.cuh"], folders, "avx2")
    assert kernel["the C++ tests"][-2:] == ["gating_test", "gating_simt_test"]
    assert kernel["ctest"][-1] == r"^(gating)\.avx2\.|^cuda\.(gating)\.0-late\."
    assert "ruff" not in kernel
    assert "(common|gating|permutation)" in check.commands(["tests/simt/y.h"], folders, "avx2")["ctest"][-1]
