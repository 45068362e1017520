"""Defaults that a calibration found for one model, kept in a YAML file named after it.

``quest-vllm calibrate MODEL`` writes such a file: ``settings`` (keys of the server defaults) and ``evidence``. It is
looked for by the last part of the model's name or folder, in ``$QUEST_MODELS_DIR``, then
``~/.config/quest_vllm/models``, then the packaged ``configs/models``. Knows nothing of vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quest_vllm.errors import QuestConfigError

ENV_MODELS_DIR = "QUEST_MODELS_DIR"


def packaged_models_dir() -> Path:
    """``configs/models``: inside the package in a wheel, at the top level in a checkout."""
    package = Path(__file__).resolve().parent
    wheel = package / "_configs" / "models"
    return wheel if wheel.is_dir() else package.parent / "configs" / "models"


def search_dirs(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Where settings are looked for, best first."""
    environ = os.environ if environ is None else environ
    named = environ.get(ENV_MODELS_DIR)
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".config")
    return [*([Path(named)] if named else []), Path(home) / "quest_vllm" / "models", packaged_models_dir()]


def file_name(model: str) -> str:
    """The file of a model: its folder's or repository's name and ``.yaml``."""
    return f"{Path(model.rstrip('/')).name}.yaml"


def find_settings(model: str, environ: Mapping[str, str] | None = None) -> tuple[str, Mapping[str, Any]]:
    """The path and the ``settings`` of ``model``'s file; ("", {}) without one.

    Raises :class:`QuestConfigError` for a file that cannot be read or has no mapping of settings.
    """
    for folder in search_dirs(environ):
        path = folder / file_name(model)
        if path.is_file():
            return str(path), read_settings(path)
    return "", {}


def read_settings(path: Path) -> Mapping[str, Any]:
    """The ``settings`` in a file that ``quest-vllm calibrate`` wrote, YAML or JSON; raises as :func:`find_settings`."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QuestConfigError(f"cannot read the YAML file {path}: {error}") from error
    settings = loaded.get("settings") if isinstance(loaded, Mapping) else None
    if not isinstance(settings, Mapping):
        raise QuestConfigError(f"{path}: expected a mapping with the key settings, got {loaded!r:.80}")
    return settings
