"""The ``quest-vllm bench`` command line: options in, exit code out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from quest_vllm.bench.plan import AGAINST, FEWEST_TOKENS, Options
from quest_vllm.eval.cli import budget_list, number, numbers
from quest_vllm.exit_codes import DONE, SOME_FAILED, STOPS, help_text, stop

DESCRIPTION = """\
Measure what a token budget saves in time: latency and throughput over context lengths, batch sizes and budgets, each
against dense attention (or stock vLLM) in the same run.
"""
EPILOG = f"""\
examples:
  quest-vllm bench MODEL                                   starts a server, measures dense, 1024 and 512, stops it
  quest-vllm bench MODEL --context 4096,16384,65536 --batch 1,8 --budgets dense,2048,1024 --repeats 3
  quest-vllm bench MODEL --against stock                   stock vLLM and ours in turn, a start of each a repeat
  quest-vllm bench http://127.0.0.1:8000 --batch 1,4,16    a running server; nothing is started
  quest-vllm bench http://10.0.0.5:8000 --against http://10.0.0.6:8000      ours there, stock vLLM there
  quest-vllm bench MODEL -- --tensor-parallel-size 2       what follows -- goes to every server that is started

what is measured:
  A round sends a batch of requests at once, each with exactly as many prompt tokens as --context says, and streams the
  answers. Prompts are running text behind a mark of their own: a prefix cache holds none of them.
  TTFT  request sent to first output: queue and prefill, which is dense at every budget
  ITL   time between outputs while the whole batch decodes, so without prefill: what a budget can change
  TPOT  of a request: (last output - first) / (tokens - 1), other requests' prefill included
  A machine that does other things lies: watch the range of the ratios, and take --repeats 3 or more.

results in --output: results.json (every sample, versions, settings), results.png and results.svg (where matplotlib is
installed), and the log of each server that was started. An interrupted sweep leaves what it has.

{help_text("bench")}
"""


def _against(text: str) -> str:
    if text in AGAINST or text.startswith(("http://", "https://")):
        return text
    raise argparse.ArgumentTypeError(f"expected {', '.join(AGAINST)} or the URL of a stock server, got {text!r}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``quest-vllm bench``."""
    parser = argparse.ArgumentParser(
        prog="quest-vllm bench",
        usage="%(prog)s MODEL_OR_URL [options] [-- flags of vllm serve]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("target", metavar="MODEL_OR_URL", help="a model to serve here, or the http(s) URL of a running server")
    add(
        "--context",
        type=numbers(FEWEST_TOKENS),
        default="4096",
        metavar="N,...",
        help="prompt lengths in tokens; default %(default)s",
    )
    add("--batch", type=numbers(1), default="1,4", metavar="N,...", help="requests at a time; default %(default)s")
    add(
        "--budgets",
        type=budget_list,
        default="dense,1024,512",
        metavar="B,...",
        help="default %(default)s; dense is always measured",
    )
    add(
        "--against",
        type=_against,
        default=AGAINST[0],
        metavar="WHAT",
        help="what ratios compare with: dense (budget 0 on the same server), stock (stock vLLM of this environment, "
        "started here), or the URL of a stock server; default %(default)s",
    )
    add("--tokens", type=number(2), default=64, metavar="N", help="output tokens of a request; default %(default)s")
    add("--repeats", type=number(1), default=1, metavar="N", help="rounds of each cell; default %(default)s")
    add("--seed", type=number(0), default=0, metavar="S", help="same seed, same prompts; default %(default)s")
    add("--output", type=Path, default=Path("quest-bench"), metavar="DIR", help="default %(default)s")
    add("--text", type=Path, metavar="FILE", help="text that prompts are cut from; default: Python's documentation")
    add("--tokenizer", metavar="MODEL", help="default: the folder or name that the server gives; any text will do")
    add("--timeout", type=number(1), default=600, metavar="SECONDS", help="of one request; default %(default)s")
    http = parser.add_argument_group("for a URL")
    http.add_argument("--model-name", metavar="NAME", help="default: the first that the server lists")
    http.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY", "-"), metavar="KEY", help="default: $OPENAI_API_KEY"
    )
    start = parser.add_argument_group("for servers started here")
    start.add_argument(
        "--start-timeout",
        type=number(1),
        default=900,
        metavar="SECONDS",
        help="until a server must be healthy; default %(default)s",
    )
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """Options from command-line words; bad ones end the process with code 2, as argparse does."""
    words = list(arguments)
    serve_args: list[str] = []
    if "--" in words:
        place = words.index("--")
        words, serve_args = words[:place], words[place + 1 :]
    parser = build_parser()
    parsed = parser.parse_args(words)
    options = Options(
        target=parsed.target,
        contexts=parsed.context,
        batches=parsed.batch,
        budgets=parsed.budgets,
        against=parsed.against,
        tokens=parsed.tokens,
        repeats=parsed.repeats,
        seed=parsed.seed,
        output=parsed.output,
        tokenizer=parsed.tokenizer,
        text=parsed.text,
        model_name=parsed.model_name,
        api_key=parsed.api_key,
        timeout=float(parsed.timeout),
        start_timeout=float(parsed.start_timeout),
        serve_args=tuple(serve_args),
    )
    if serve_args and options.is_url and options.against != "stock":
        parser.error(f"--: expected flags of vllm serve only where a server is started, got {shlex.join(serve_args)}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run ``quest-vllm bench``; returns its exit code."""
    from quest_vllm.bench.run import bench

    options = parse_options(arguments)
    command = shlex.join(["quest-vllm", "bench", *arguments])
    try:
        sweep = bench(options, command)
    except STOPS as why:
        return stop("bench", why, "interrupted")
    if sweep.failed:
        first = next(record["error"] for record in sweep.rounds if "error" in record)
        print(f"quest-vllm bench: {sweep.failed} rounds failed, the first with {first}", file=sys.stderr)
        return SOME_FAILED
    return DONE
