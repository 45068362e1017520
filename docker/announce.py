"""Waits for the server that this process's parent becomes, and prints a request to paste.

usage: announce.py PORT MODEL_NAME

Ends without a word when the parent does: the server's own log says why it could not start.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import urllib.request

REQUEST = """
The server is up. Paste this into another terminal:

  curl -s http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d '{{
    "model": "{model}",
    "prompt": "'"$(seq -s ' ' 600)"'",
    "max_tokens": 16,
    "sparse_attention": {{"token_budget": 256}}
  }}'

It counts on; "usage" says how many of the prompt's tokens each step read. What the server did so far:

  curl -s http://127.0.0.1:{port}/metrics | grep ^quest_
"""
LIMIT_SECONDS = 600
PROGRESS_SECONDS = 5


def main() -> None:
    """Poll /health for up to ten minutes, with a line of progress every five seconds."""
    port, model = sys.argv[1:3]
    parent, start, told = os.getppid(), time.monotonic(), 0
    while (elapsed := int(time.monotonic() - start)) < LIMIT_SECONDS and os.getppid() == parent:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            print(REQUEST.format(port=port, model=model), flush=True)
            return
        if elapsed >= told + PROGRESS_SECONDS:
            told = elapsed
            print(f"starting the server: {elapsed} s", flush=True)
        time.sleep(1)


if __name__ == "__main__":
    main()
