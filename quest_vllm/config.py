"""Server defaults: one frozen dataclass, four sources, strict.

In order of increasing precedence: ``configs/default.yaml`` (or the YAML file that ``QUEST_CONFIG`` names),
``--additional-config '{"quest": {...}}'``, and the environment (``QUEST_TOKEN_BUDGET=1024``, one variable a key).
Knows nothing of vLLM; what one request may ask for is in :mod:`quest_vllm.budget`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quest_vllm.errors import QuestConfigError

PAGE_SIZES = (16, 32, 64)
GROUP_REDUCTIONS = ("max", "mean", "mass", "per_query_head")
IMPLEMENTATIONS = ("auto", "reference", "torch", "cpu", "triton")
MAX_TOKEN_BUDGET = 2**31 - 1
ENV_PREFIX = "QUEST_"
ENV_CONFIG = "QUEST_CONFIG"
ADDITIONAL_CONFIG_KEY = "quest"


@dataclass(frozen=True)
class QuestConfig:
    """Server defaults. Raises :class:`QuestConfigError` for a value of the wrong type or out of range.

    ``token_budget`` counts sink, recent and current pages; 0 means dense. ``metrics_dir`` None means one per server.
    """

    token_budget: int = 2048
    page_size: int = 16
    sink_pages: int = 1
    recent_pages: int = 2
    dense_layers: tuple[int, ...] = (0, 1)
    group_reduction: str = "max"
    bound_radius: float = 0.5
    implementation: str = "auto"
    metrics_dir: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _CHECKS[field.name](field.name, value))
        if 0 < self.token_budget < self.min_token_budget:
            raise _bad_value(
                "token_budget",
                f"0 (dense) or at least {self.min_token_budget} = (sink_pages + recent_pages) * page_size",
                self.token_budget,
            )

    @property
    def min_token_budget(self) -> int:
        """The smallest legal budget other than 0: the forced pages, in tokens."""
        return (self.sink_pages + self.recent_pages) * self.page_size


def load_config(
    additional_config: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> QuestConfig:
    """The server's defaults from all four sources.

    ``additional_config`` is vLLM's ``--additional-config`` mapping, of which the key "quest" is read; ``environ`` is
    ``os.environ`` unless given. Raises :class:`QuestConfigError` naming the source and the key.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for source, layer in (
        _yaml_layer(environ),
        ('--additional-config, "quest"', _additional_layer(additional_config)),
        ("environment", _environment_layer(environ)),
    ):
        _check_keys(source, layer)
        values.update(layer)
    return QuestConfig(**values)


def default_config_path() -> Path | None:
    """The packaged ``default.yaml``: inside the package in a wheel, at the top level in a checkout; None without it."""
    package = Path(__file__).resolve().parent
    for path in (package / "_configs" / "default.yaml", package.parent / "configs" / "default.yaml"):
        if path.is_file():
            return path
    return None


def _yaml_layer(environ: Mapping[str, str]) -> tuple[str, Mapping[str, Any]]:
    named = environ.get(ENV_CONFIG)
    path = Path(named) if named else default_config_path()
    return (str(path), _read_yaml(path)) if path else ("packaged defaults", {})


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QuestConfigError(f"cannot read the YAML file {path}: {error}") from error
    return _mapping(str(path), loaded)


def _additional_layer(additional_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not isinstance(additional_config, Mapping):
        return {}
    return _mapping('--additional-config, "quest"', additional_config.get(ADDITIONAL_CONFIG_KEY))


def _mapping(source: str, value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise QuestConfigError(f"{source}: expected a mapping of keys to values, got {value!r}")
    return value


def _environment_layer(environ: Mapping[str, str]) -> Mapping[str, Any]:
    _check_variables(environ)
    layer: dict[str, Any] = {}
    for field in fields(QuestConfig):
        name = ENV_PREFIX + field.name.upper()
        text = environ.get(name)
        if text is not None and text != "":
            layer[field.name] = _from_text(name, text, field.name)
    return layer


def _check_variables(environ: Mapping[str, str]) -> None:
    """Refuse a near miss of one of our variables; other QUEST_ variables may be anyone's."""
    known = [ENV_CONFIG, *(ENV_PREFIX + field.name.upper() for field in fields(QuestConfig))]
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                raise QuestConfigError(f"environment: unknown variable {name}; did you mean {near[0]}?")


def _from_text(name: str, text: str, key: str) -> object:
    if _CHECKS[key] is _check_layers:
        return [_int_from_text(name, part) for part in text.strip("[]() ").split(",") if part.strip()]
    if key in _INT_KEYS:
        return _int_from_text(name, text)
    return _float_from_text(name, text) if key in _FLOAT_KEYS else text


def _int_from_text(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _bad_value(name, "an integer", text) from None


def _float_from_text(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _bad_value(name, "a number", text) from None


def _check_keys(source: str, layer: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(QuestConfig)]
    for key in layer:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise QuestConfigError(
                f"{source}: unknown key {key!r}; did you mean {near!r}? Known keys: {', '.join(known)}"
            )


def _bad_value(key: str, expected: str, value: object) -> QuestConfigError:
    return QuestConfigError(f"{key}: expected {expected}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int_between(low: int, high: int) -> Callable[[str, Any], int]:
    def check(key: str, value: Any) -> int:
        if not _is_int(value) or not low <= value <= high:
            raise _bad_value(key, f"an integer from {low} to {high}", value)
        return int(value)

    return check


def _number_between(low: float, high: float) -> Callable[[str, Any], float]:
    def check(key: str, value: Any) -> float:
        if not (_is_int(value) or isinstance(value, float)) or not low <= value <= high:  # NaN is in no range
            raise _bad_value(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    return check


def _page_size(key: str, value: Any) -> int:
    if not _is_int(value) or value not in PAGE_SIZES:
        raise _bad_value(key, f"one of {', '.join(map(str, PAGE_SIZES))}", value)
    return int(value)


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _bad_value(key, f"one of {', '.join(choices)}", value)
        return value

    return check


def _check_layers(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(_is_int(layer) and layer >= 0 for layer in value):
        raise _bad_value(key, "a list of layer indices, each 0 or more", value)
    return tuple(sorted(set(value)))


def _directory(key: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _bad_value(key, "a directory's path, or null", value)
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "token_budget": _int_between(0, MAX_TOKEN_BUDGET),
    "page_size": _page_size,
    "sink_pages": _int_between(0, 1024),
    "recent_pages": _int_between(1, 1024),
    "dense_layers": _check_layers,
    "group_reduction": _one_of(GROUP_REDUCTIONS),
    "bound_radius": _number_between(0, 1),
    "implementation": _one_of(IMPLEMENTATIONS),
    "metrics_dir": _directory,
}
_INT_KEYS = ("token_budget", "page_size", "sink_pages", "recent_pages")
_FLOAT_KEYS = ("bound_radius",)
