"""Server defaults: one frozen dataclass, four sources, strict.

In order of increasing precedence: ``configs/default.yaml`` (or the YAML file that ``QUEST_CONFIG`` names),
``--additional-config '{"quest": {...}}'``, and the environment (``QUEST_TOKEN_BUDGET=1024``, one variable a key).
Knows nothing of vLLM; what one request may ask for is in :mod:`quest_vllm.budget`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from quest_vllm.errors import QuestConfigError
from quest_vllm.model_settings import ENV_MODELS_DIR, find_settings

PAGE_SIZES = (16, 32, 64)
GROUP_REDUCTIONS = ("max", "mean", "mass", "per_query_head")
WINDOW, TWO_STAGE = "window", "two_stage"
POLICIES = (*GROUP_REDUCTIONS, WINDOW, TWO_STAGE)  # of a request; a kernel knows one by its place here
MASS_POLICIES = ("mass", "max", "mean", TWO_STAGE, WINDOW)  # where the server's own is mass, by key codes
PAGE_SUMMARIES = ("min_max", "key_codes")
AUTO = "auto"  # of page_summary, group_reduction and policy: see QuestConfig.resolved
KEY_CODE_PAGE_SIZE, KEY_CODE_CHANNELS = 16, 64  # the page size of key codes, and what divides their head_dim
BOUND_RADIUS = 0.5
IMPLEMENTATIONS = ("auto", "reference", "torch", "cpu", "triton", "cuda")
MAX_TOKEN_BUDGET = 2**31 - 1
MAX_LAYER_SHARE = 1000
ENV_PREFIX = "QUEST_"
ENV_CONFIG = "QUEST_CONFIG"
ADDITIONAL_CONFIG_KEY = "quest"
_ALIAS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class QuestConfig:
    """Server defaults. Raises :class:`QuestConfigError` for a value of the wrong type or out of range.

    ``token_budget`` counts sink, recent and current pages; 0 means dense. ``layer_shares`` are pairs of a layer's index
    and its share, see :mod:`quest_vllm.layer_shares`. ``top_p`` below 1 adapts the budget, see
    :func:`quest_vllm.ops.reference.select_pages`. ``metrics_dir`` None means one per server.
    Five concern HTTP requests alone: smallest and largest budget (tokens) that they may name, whether they may name one
    at all, the budgets behind model names like ``MODEL:fast``, and the largest body in bytes. ``audit_steps`` 0 means
    no audit while serving; ``page`` lets requests of the page at /quest be traced. ``page_summary``,
    ``group_reduction`` and ``policy`` may be "auto", which :meth:`resolved` replaces once the model is known.
    """

    token_budget: int = 2048
    top_p: float = 1.0
    page_size: int = 16
    sink_pages: int = 1
    recent_pages: int = 2
    dense_layers: tuple[int, ...] = ()
    layer_shares: tuple[tuple[int, float], ...] = ()
    group_reduction: str = AUTO
    policy: str = AUTO
    bound_radius: float = BOUND_RADIUS
    page_summary: str = AUTO
    implementation: str = "auto"
    metrics_dir: str | None = None
    min_budget: int = 0
    max_budget: int | None = None
    allow_override: bool = True
    aliases: tuple[tuple[str, int], ...] = ()
    max_body_bytes: int = 32 * 2**20
    audit_steps: int = 0
    page: bool = False

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
        if self.page_summary == "key_codes" and self.page_size != KEY_CODE_PAGE_SIZE:
            raise _bad_value("page_size", f"{KEY_CODE_PAGE_SIZE} with page_summary key_codes", self.page_size)
        self._check_policy()
        self._check_limits()

    def _check_policy(self) -> None:
        """The default must be a policy that a request may name; not known while ``group_reduction`` is "auto"."""
        reduction = self.group_reduction
        legal = _policies_beside(reduction, self.page_summary)
        if AUTO not in (reduction, self.policy) and self.policy not in legal:
            lacking = "page_summary to key_codes" if reduction == "mass" else "group_reduction to mass"
            hint = f"; set {lacking} for others" if self.policy in MASS_POLICIES else ""
            expected = f"one of {', '.join((AUTO, *legal))} with group_reduction {reduction}"
            raise QuestConfigError(f"policy: expected {expected}, got {self.policy!r}{hint}")

    def _check_limits(self) -> None:
        """The default and every alias must be budgets that a request may name."""
        smallest = max(self.min_budget, self.min_token_budget)
        if self.max_budget is not None and self.max_budget < smallest:
            raise _bad_value("max_budget", f"null or at least {smallest}", self.max_budget)
        for key, budget in (("token_budget", self.token_budget), *((f"aliases: {n}", b) for n, b in self.aliases)):
            if 0 < budget < self.min_token_budget:
                raise _bad_value(key, f"0 (dense) or at least {self.min_token_budget}", budget)
            if limit := self.broken_limit(budget):
                raise QuestConfigError(f"{key}: got {budget}, but {limit}")

    def broken_limit(self, budget: int) -> str | None:
        """The operator's limit that a budget in tokens (0: dense) breaks, in words; None if it keeps to both."""
        if self.max_budget is not None and budget == 0:
            return f"max_budget is {self.max_budget}, and dense attention (0) reads more than any budget"
        if self.max_budget is not None and budget > self.max_budget:
            return f"max_budget is {self.max_budget}"
        return f"min_budget is {self.min_budget}" if 0 < budget < self.min_budget else None

    def resolved(self, why_boxes: str | None = None) -> QuestConfig:
        """The same without "auto": key codes unless ``why_boxes`` (or :meth:`why_boxes`) has something against them.

        The heads of a group are joined by "mass" with key codes, by "max" with minima and maxima; ``policy`` auto is
        just that. Raises :class:`QuestConfigError` for a ``policy`` that is not among :attr:`policies` then.
        """
        summary, reduction = self.page_summary, self.group_reduction
        if summary == AUTO:
            summary = "min_max" if why_boxes or self.why_boxes() else "key_codes"
        if reduction == AUTO:
            reduction = "mass" if summary == "key_codes" else "max"
        policy = reduction if self.policy == AUTO else self.policy
        return replace(self, page_summary=summary, group_reduction=reduction, policy=policy)

    def why_boxes(self, head_dim: int | None = None) -> str | None:
        """Why ``page_summary`` auto means min_max, in words; None where it means key_codes.

        ``head_dim`` None: not known. What a device has against it is :mod:`quest_vllm.runtime`'s to say.
        """
        if why := why_no_codes(self.page_size, head_dim):
            return why
        if self.bound_radius != BOUND_RADIUS:
            return f"bound_radius is set, to {self.bound_radius}, and key codes have none"
        return None

    @property
    def own_policy(self) -> str:
        """The policy of requests that name none."""
        return self.group_reduction if self.policy == AUTO else self.policy

    @property
    def policies(self) -> tuple[str, ...]:
        """What a request may name as its policy, the server's own first."""
        return tuple(dict.fromkeys((self.own_policy, *_policies_beside(self.group_reduction, self.page_summary))))

    @property
    def min_token_budget(self) -> int:
        """The smallest legal budget other than 0: the forced pages, in tokens."""
        return (self.sink_pages + self.recent_pages) * self.page_size


def _policies_beside(group_reduction: str, page_summary: str) -> tuple[str, ...]:
    """The legal policies where the server joins heads so, and has such summaries.

    Every head's scores are at hand, to be joined otherwise, where it joins them by their masses. Masses that keys hold
    can be compared with those that key codes promise, not with a box's, which are greater.
    """
    if group_reduction != "mass":
        return group_reduction, WINDOW
    return tuple(name for name in MASS_POLICIES if name != TWO_STAGE or page_summary != "min_max")


def why_no_codes(page_size: int, head_dim: int | None) -> str | None:
    """Why pages of ``page_size`` keys of ``head_dim`` channels (None: not known) have no key codes; None: they can."""
    if page_size != KEY_CODE_PAGE_SIZE:
        return f"key codes need page_size {KEY_CODE_PAGE_SIZE}, got {page_size}"
    if head_dim is not None and head_dim % KEY_CODE_CHANNELS:
        return f"key codes need a head_dim that is a multiple of {KEY_CODE_CHANNELS}, got {head_dim}"
    return None


def load_config(
    additional_config: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    model: str | None = None,
) -> QuestConfig:
    """The server's defaults from all sources, of which a calibration of ``model`` is the weakest but one.

    ``additional_config`` is vLLM's ``--additional-config`` mapping, of which the key "quest" is read; ``environ`` is
    ``os.environ`` unless given. Raises :class:`QuestConfigError` naming the source and the key.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    calibrated = [find_settings(model, environ)] if model else []
    yaml_layer = _yaml_layer(environ)
    files = [yaml_layer, *calibrated]
    if environ.get(ENV_CONFIG):  # a file that somebody named wins over one that was found
        files.reverse()
    for source, layer in (
        *files,
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
    known = [ENV_CONFIG, ENV_MODELS_DIR, *(ENV_PREFIX + field.name.upper() for field in fields(QuestConfig))]
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
    if key in _FLOAT_KEYS:
        return _float_from_text(name, text)
    if _CHECKS[key] is _flag:
        return _flag_from_text(name, text)
    if _CHECKS[key] is _aliases:
        return _aliases_from_text(name, text)
    if _CHECKS[key] is _layer_shares:
        return _shares_from_text(name, text)
    return text


def _flag_from_text(name: str, text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise _bad_value(name, "true or false", text)
    return text.lower() in ("true", "1")


def _aliases_from_text(name: str, text: str) -> dict[str, int]:
    """``fast=512,exact=0``."""
    aliases: dict[str, int] = {}
    for part in text.split(","):
        alias, equals, budget = part.strip().partition("=")
        if not equals or alias in aliases:
            raise _bad_value(name, "NAME=TOKENS, comma-separated, each name once", text)
        aliases[alias] = _int_from_text(name, budget)
    return aliases


def _shares_from_text(name: str, text: str) -> dict[int, float]:
    """``0=1.2,1=0.8``; ``{}``: none."""
    shares: dict[int, float] = {}
    for part in text.strip("{} ").split(","):
        layer, equals, share = part.strip().partition("=")
        if not equals and not part.strip():
            continue
        if not equals or _int_from_text(name, layer) in shares:
            raise _bad_value(name, "LAYER=SHARE, comma-separated, each layer once", text)
        shares[int(layer)] = _float_from_text(name, share)
    return shares


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


def _share(key: str, value: Any) -> float:
    if not (_is_int(value) or isinstance(value, float)) or not 0 < value <= 1:  # NaN is in no range
        raise _bad_value(key, "a number above 0, up to 1", value)
    return float(value)


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


def _layer_shares(key: str, value: Any) -> tuple[tuple[int, float], ...]:
    pairs = dict(value) if isinstance(value, tuple) else value
    if not isinstance(pairs, Mapping):
        raise _bad_value(key, "a mapping of layer indices to shares, like {0: 1.2, 1: 0.8}", value)
    shares: dict[int, float] = {}
    for layer, share in pairs.items():
        index = int(layer) if isinstance(layer, str) and layer.isascii() and layer.isdigit() else layer  # JSON's keys
        if not _is_int(index) or index < 0 or index in shares:
            raise _bad_value(key, "layer indices, each 0 or more and named once", layer)
        shares[index] = _number_between(0, MAX_LAYER_SHARE)(f"{key}: {index}", share)
    return tuple(sorted(shares.items()))


def _directory(key: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _bad_value(key, "a directory's path, or null", value)
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad_value(key, "true or false", value)
    return value


def _int_or_none(low: int, high: int) -> Callable[[str, Any], int | None]:
    check = _int_between(low, high)
    return lambda key, value: None if value is None else check(key, value)


def _aliases(key: str, value: Any) -> tuple[tuple[str, int], ...]:
    pairs = dict(value) if isinstance(value, tuple) else value
    if not isinstance(pairs, Mapping):
        raise _bad_value(key, 'a mapping of names to budgets, like {"fast": 512}', value)
    for name, budget in pairs.items():
        if not isinstance(name, str) or not _ALIAS_NAME.fullmatch(name):
            raise _bad_value(key, "names of up to 64 letters, digits, dots, hyphens and underscores", name)
        _int_between(0, MAX_TOKEN_BUDGET)(f"{key}: {name}", budget)
    return tuple(pairs.items())


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "token_budget": _int_between(0, MAX_TOKEN_BUDGET),
    "top_p": _share,
    "page_size": _page_size,
    "sink_pages": _int_between(0, 1024),
    "recent_pages": _int_between(1, 1024),
    "dense_layers": _check_layers,
    "layer_shares": _layer_shares,
    "group_reduction": _one_of((AUTO, *GROUP_REDUCTIONS)),
    "policy": _one_of((AUTO, *POLICIES)),
    "bound_radius": _number_between(0, 1),
    "page_summary": _one_of((AUTO, *PAGE_SUMMARIES)),
    "implementation": _one_of(IMPLEMENTATIONS),
    "metrics_dir": _directory,
    "min_budget": _int_between(0, MAX_TOKEN_BUDGET),
    "max_budget": _int_or_none(1, MAX_TOKEN_BUDGET),
    "allow_override": _flag,
    "aliases": _aliases,
    "max_body_bytes": _int_between(1024, 2**40),
    "audit_steps": _int_between(0, 2**31 - 1),
    "page": _flag,
}
_FLOAT_KEYS = ("bound_radius", "top_p")
_INT_KEYS = (
    "token_budget",
    "page_size",
    "sink_pages",
    "recent_pages",
    "min_budget",
    "max_budget",
    "max_body_bytes",
    "audit_steps",
)
