"""Runs the steps of a Dockerfile without a container: in a folder, with an empty environment, as another user.

usage: run_steps.py DOCKERFILE FOLDER [--port N] [--build-only]

For machines without a container daemon. It does what the file says (COPY from git's files less .dockerignore, RUN,
ENV, COPY --from, ENTRYPOINT, CMD, HEALTHCHECK) with absolute paths moved under FOLDER, and it says what it leaves out:
packages of the distribution and users, which the machine must have, and stages on an image other than Python's.
The server is started, waited for with the file's own HEALTHCHECK, asked for a completion, and stopped with SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UID = 10001
MOVED = ("/opt/", "/src", "/wheel", "/home/quest")
LEFT_OUT = ("apt-get ", "rm -rf /var/lib", "useradd ", "chmod -R g=u /home")
START_SECONDS = 300


@dataclass
class Stage:
    """One FROM and what follows it."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile; comments are dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(str.strip, "\n".join(lines).replace("\\\n", " ").splitlines()):
        instruction, rest = line.split(None, 1)
        if instruction == "ARG" and not stages:
            name, _, value = rest.partition("=")
            arguments["${" + name + "}"] = value
        elif instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(arguments.get(base, base), name.strip()))
        else:
            stages[-1].steps.append((instruction, " ".join(rest.split())))
    return stages


class Runner:
    """Runs stages under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.work = folder
        self.commands: dict[str, list[str]] = {}
        self.health: list[str] = []
        self.uid = 0

    def moved(self, text: str) -> str:
        """``text`` with the image's absolute paths under the folder."""
        for path in MOVED:
            text = text.replace(path, f"{self.folder}{path}")
        return text

    def run_stage(self, stage: Stage) -> None:
        """Every step of a stage, from a fresh environment."""
        kept = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))}
        self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.folder), **kept}
        for instruction, rest in stage.steps:
            print(f"-- {instruction} {rest[:150]}", flush=True)
            getattr(self, f"do_{instruction.lower()}")(rest)

    def do_workdir(self, rest: str) -> None:
        self.work = Path(self.moved(rest))
        self.work.mkdir(parents=True, exist_ok=True)

    def do_env(self, rest: str) -> None:
        for item in shlex.split(self.moved(rest)):
            name, _, value = item.partition("=")
            self.environment[name] = value.replace("$PATH", self.environment["PATH"])

    def do_arg(self, rest: str) -> None:
        if rest in os.environ:
            self.environment[rest] = os.environ[rest]

    def do_copy(self, rest: str) -> None:
        if "--from=" in rest:
            print("   (the earlier stage's files are in place already)")
            return
        ignored = [line.strip("*/") for line in (ROOT / ".dockerignore").read_text().split()]
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if not set(Path(name).parts) & set(ignored) and (ROOT / name).is_file():
                target = self.work / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)

    def do_run(self, rest: str) -> None:
        wanted = []
        for command in rest.split(" && "):
            if command.startswith(LEFT_OUT):
                print(f"   (left out: {command})")
            else:
                wanted.append(self.moved(command))
        if wanted:
            subprocess.run(["sh", "-euc", " && ".join(wanted)], cwd=self.work, env=self.environment, check=True)

    def do_user(self, rest: str) -> None:
        self.uid = int(rest.split(":")[0])
        self.environment |= {"USER": "quest"}  # the image's passwd has the name; this machine's has not
        if self.uid:
            subprocess.run(["chown", "-R", str(self.uid), str(self.folder)], check=True)

    def do_expose(self, rest: str) -> None:
        pass

    def do_healthcheck(self, rest: str) -> None:
        self.health = json.loads(rest.split("CMD ", 1)[1])

    def do_entrypoint(self, rest: str) -> None:
        self.commands["entrypoint"] = json.loads(rest)

    def do_cmd(self, rest: str) -> None:
        self.commands["cmd"] = json.loads(rest)

    def serve(self, port: int) -> None:
        """Start what the image starts, on ``port``; wait for its health check; ask; stop."""
        command = [*self.commands["entrypoint"], *self.commands["cmd"], "--port", str(port)]
        process = subprocess.Popen(command, cwd=self.work, env=self.environment, user=self.uid, group=0)
        try:
            self._wait(process, port)
            self._ask(port)
            process.send_signal(signal.SIGTERM)
            print(f"-- stopped with SIGTERM: exit code {process.wait(60)}")
        finally:
            if process.poll() is None:
                process.kill()
        if process.returncode != 0:
            sys.exit(f"expected exit code 0, got {process.returncode}")

    def _wait(self, process: subprocess.Popen[bytes], port: int) -> None:
        check = [part.replace("8000", str(port)) for part in self.health]
        start = time.monotonic()
        while subprocess.run(check, env=self.environment, capture_output=True, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > start + START_SECONDS:
                sys.exit(f"not healthy after {time.monotonic() - start:.0f} s, exit code {process.poll()}")
            time.sleep(2)
        print(f"-- healthy after {time.monotonic() - start:.0f} s, as user {self.uid}", flush=True)

    def _ask(self, port: int) -> None:
        base = f"http://127.0.0.1:{port}"
        model = json.loads(urllib.request.urlopen(f"{base}/v1/models", timeout=30).read())["data"][0]["id"]
        body = {"model": model, "prompt": "A river is " * 200, "max_tokens": 4, "ignore_eos": True}
        body["vllm_xargs"] = {"quest_token_budget": 64}
        request = urllib.request.Request(
            f"{base}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        print("--", json.loads(urllib.request.urlopen(request, timeout=120).read())["usage"])
        shown = urllib.request.urlopen(f"{base}/metrics", timeout=30).read().decode()
        print("--", next(line for line in shown.splitlines() if line.startswith("quest_pages_selected_total")))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("folder", type=Path, help="must not exist yet")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--build-only", action="store_true", help="do not start the server")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    runner = Runner(arguments.folder.resolve())
    stages = parse(arguments.dockerfile.read_text())
    for stage in stages:
        if not stage.base.startswith("python:"):
            print(f"== left out: stage on {stage.base}")
            return
        print(f"== stage {stage.name or 'final'} on {stage.base}, here Python {sys.version.split()[0]}", flush=True)
        runner.run_stage(stage)
    if not arguments.build_only:
        runner.serve(arguments.port)


if __name__ == "__main__":
    main()
