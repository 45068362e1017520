"""Completion scripts, read by the shells themselves, and the table of exit codes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quest_vllm.cli import COMMANDS, main
from quest_vllm.completion import SHELLS, command_parsers, script
from quest_vllm.exit_codes import INTERRUPTED, MEANINGS, help_text

pytest.importorskip("shtab")


def shell(name: str, code: str, tmp_path: Path) -> list[str]:
    """Words that ``code`` prints in shell ``name``, in which ``$SCRIPT`` is our completion."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    path = tmp_path / "script"
    path.write_text(script(name, COMMANDS))
    done = subprocess.run(
        [name, "-c", code],
        env={"SCRIPT": str(path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def in_bash(line: str, tmp_path: Path) -> list[str]:
    words = line.split(" ")
    code = (
        f'source "$SCRIPT"; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; '
        f'_shtab_quest_vllm quest-vllm "{words[-1]}"; echo "${{COMPREPLY[@]}}"'
    )
    return shell("bash", code, tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quest-vllm be", ["bench"]),
        ("quest-vllm bench --ag", ["--against"]),
        ("quest-vllm serve --quest-au", ["--quest-audit"]),
        ("quest-vllm eval --quest", ["--question"]),
        ("quest-vllm completion f", ["fish"]),
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    assert in_bash(line, tmp_path) == expected


def test_fish_completes(tmp_path: Path) -> None:
    assert "--against" in shell("fish", 'source "$SCRIPT"; complete -C "quest-vllm bench --ag"', tmp_path)
    assert "calibrate" in shell("fish", 'source "$SCRIPT"; complete -C "quest-vllm ca"', tmp_path)


def test_zsh_reads_it(tmp_path: Path) -> None:
    code = 'autoload -Uz compinit && compinit -u && source "$SCRIPT" 2>/dev/null; whence -w _shtab_quest_vllm'
    assert shell("zsh", code, tmp_path) == ["_shtab_quest_vllm:", "function"]
    shell("zsh", 'zsh -n "$SCRIPT"', tmp_path)


@pytest.mark.parametrize("name", SHELLS)
def test_the_command_prints_the_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", name]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS) and "quest-max-budget" in shown


def test_an_unknown_shell_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "ksh"])
    assert ended.value.code == 2
    assert "'ksh'" in capsys.readouterr().err


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 3
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_exit_code(command: str) -> None:
    parser = command_parsers()[command]()
    assert help_text(command) in str(parser.epilog)
    assert list(MEANINGS[command]) == sorted(MEANINGS[command]) and 0 in MEANINGS[command]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "serve"])
def test_bad_usage_is_two_everywhere(command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--no-such-flag"])
    assert ended.value.code == 2 and 2 in MEANINGS[command]


def test_only_what_takes_long_tells_of_interruption() -> None:
    assert {name for name, codes in MEANINGS.items() if INTERRUPTED in codes} == {"eval", "bench", "calibrate"}
