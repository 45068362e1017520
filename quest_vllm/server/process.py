"""What ``quest-vllm serve`` becomes: vLLM's own command, with an exit code that tells of a dead engine.

vLLM 0.32 ends with 0 after its engine died, so that a supervisor that restarts failures alone would leave it down.
"""

from __future__ import annotations

import sys

from quest_vllm import compat
from quest_vllm.exit_codes import SOME_FAILED
from quest_vllm.server import facts


def main() -> int:
    """Run ``vllm`` with this process's arguments; returns the exit code."""
    sys.argv[0] = "vllm"
    compat.vllm_command()()
    if facts.engine_died():
        print("quest-vllm serve: the engine died, see the log above; ending with a failure", file=sys.stderr)
        return SOME_FAILED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
