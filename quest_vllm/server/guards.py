"""Bad requests that vLLM 0.32 answers with HTTP 500 where 400 is due; found by benchmarks/fuzz_api.py.

Each check goes once vLLM refuses its case itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from quest_vllm.budget import shown
from quest_vllm.server.asgi import Refusal

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def refuse_crashing(body: bytes, request: Mapping[str, Any]) -> None:
    """Raise :class:`~quest_vllm.server.asgi.Refusal` (400) if vLLM would trip over ``request``, read from ``body``."""
    structured = request.get("structured_outputs")
    # a validator of vLLM's calls .get() on it before its type is checked
    if structured is not None and not isinstance(structured, dict):
        message = f"structured_outputs: expected an object, got {shown(structured)}"
        raise Refusal(400, "structured_outputs", message)
    # JSON can spell half a UTF-16 pair, which no encoder on the way to the engine takes
    if _SURROGATE.search(body) is not None:
        try:
            json.dumps(request, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise Refusal(
                400, None, f"the body holds {half}, half of a surrogate pair, which is no character"
            ) from None
        except RecursionError:
            return
