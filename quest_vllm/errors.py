"""Every error that quest_vllm raises on purpose.

    QuestError
    ├── QuestConfigError(ValueError)   a server default is unknown or out of range: start-up stops
    ├── QuestValueError(ValueError)    one request's parameter is out of range: that request gets HTTP 400
    ├── EvalUnavailable                a measurement's endpoint or engine cannot be used
    └── compat.UnsupportedVllm         this vLLM, or a feature switched on in it, cannot work with us

Messages say what was expected and what came.
"""


class QuestError(Exception):
    """Base of every error that quest_vllm raises on purpose."""


class QuestConfigError(QuestError, ValueError):
    """A server default is unknown, of the wrong type or out of range."""


class QuestValueError(QuestError, ValueError):
    """A request's parameter is of the wrong type or out of range."""


class EvalUnavailable(QuestError):
    """The endpoint or the engine cannot be used; nothing is wrong with the command line."""
