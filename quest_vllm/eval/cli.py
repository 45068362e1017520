"""The ``quest-vllm eval`` command line: options in, exit code out."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quest_vllm.eval.plan import DECODE, DENSE, PREFILL, Plan
from quest_vllm.eval.run import evaluate
from quest_vllm.eval.session import Options
from quest_vllm.eval.tasks import TASKS
from quest_vllm.eval.text import CONTINUATION, TEXT
from quest_vllm.exit_codes import DONE, SOME_FAILED, STOPS, help_text, stop

DESCRIPTION = "Measure what a token budget costs in quality: scores, KL and text against dense attention, same run."
EPILOG = f"""\
examples:
  quest-vllm eval MODEL                                   in process: both ways of reading a question, KL and NLL
  quest-vllm eval MODEL --tasks needle_multikey,text --context 4096,16384 --budgets dense,1024,256 --items 50
  quest-vllm eval http://127.0.0.1:8000 --concurrency 16  a running server, asked over HTTP
  quest-vllm eval MODEL --tasks text --text notes.txt     on your own text

where the question is read (--question):
  decode    token by token with sparse attention, as a model reads its own reasoning: the honest number (in process)
  prefill   densely, with the rest of the prompt, as a server does: attention that finds the answer while it reads
            the question hides part of the loss

results in --output: items.jsonl (one line a measurement; the same command goes on from there, and more budgets,
tasks or contexts may be added), results.json (everything, with intervals), results.png (where matplotlib is installed).

{help_text("eval")}

tasks:
"""


def _task_help() -> str:
    lines = [f"  {name:20}{(task.__doc__ or '').splitlines()[0]}" for name, task in TASKS.items()]
    lines.append(f"  {CONTINUATION:20}Running text continued greedily; measures agreement with dense alone.")
    lines.append(f"  {TEXT:20}KL, NLL and top token on running text, teacher-forced in decode; in process only.")
    return "\n".join(lines)


def numbers(low: int) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: whole numbers of at least ``low`` between commas, each once."""

    def parse(text: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(number(low)(part) for part in text.split(",")))

    return parse


def number(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``low``."""

    def parse(text: str) -> int:
        if not text.strip().isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected whole numbers of at least {low}, got {text!r}")
        return int(text)

    return parse


def budget_list(text: str) -> tuple[int, ...]:
    """An argparse type: budgets between commas; dense, always among them, first, then from large to small."""
    parts = [part.strip() for part in text.split(",")]
    sparse = {number(1)(part) for part in parts if part not in ("dense", "0")}
    return (DENSE, *sorted(sparse, reverse=True))


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {name!r}")
        return names

    return parse


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``quest-vllm eval``."""
    parser = argparse.ArgumentParser(
        prog="quest-vllm eval",
        description=DESCRIPTION,
        epilog=EPILOG + _task_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "target", metavar="MODEL_OR_URL", help="a model to load here, or the http(s) URL of an OpenAI-compatible server"
    )
    add(
        "--budgets",
        type=budget_list,
        default="dense,2048,1024,512,256",
        metavar="B,...",
        help="default %(default)s; dense is always measured",
    )
    all_tasks = (*TASKS, CONTINUATION, TEXT)
    add(
        "--tasks",
        type=_names(("all", *all_tasks)),
        default="all",
        metavar="T,...",
        help="see below; default: all that the target can do",
    )
    add(
        "--context",
        type=numbers(64),
        default="4096",
        metavar="N,...",
        help="exact prompt lengths in tokens; default %(default)s",
    )
    add("--items", type=number(2), default=20, metavar="N", help="per task and context; default %(default)s")
    add("--seed", type=number(0), default=0, metavar="S", help="same seed, same items; default %(default)s")
    add("--output", type=Path, default=Path("quest-eval"), metavar="DIR", help="default %(default)s")
    add(
        "--question",
        type=_names((DECODE, PREFILL)),
        metavar="MODE,...",
        help=f"default: {DECODE},{PREFILL} in process, {PREFILL} for a URL",
    )
    add("--concurrency", type=number(1), default=8, metavar="N", help="requests at a time; default %(default)s")
    add("--chat-template", action="store_true", help="wrap prompts in the model's chat template")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help=f"text of {TEXT} and {CONTINUATION}; default: Python's own documentation",
    )
    add(
        "--text-tokens",
        type=number(2),
        default=64,
        metavar="N",
        help="tokens forced or generated on it; default %(default)s",
    )
    add("--xargs", type=json_object, metavar="JSON", help="more vllm_xargs of every request, dense ones too")
    http = parser.add_argument_group("for a URL")
    http.add_argument("--model-name", metavar="NAME", help="default: the first that the server lists")
    http.add_argument("--tokenizer", metavar="MODEL", help="default: the folder or name that the server gives")
    http.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY", "-"), metavar="KEY", help="default: $OPENAI_API_KEY"
    )
    http.add_argument(
        "--timeout", type=number(1), default=600, metavar="SECONDS", help="of one request; default %(default)s"
    )
    engine = parser.add_argument_group("in process")
    engine.add_argument(
        "--engine-args",
        type=json_object,
        metavar="JSON",
        help="arguments of vllm.LLM, as '{\"tensor_parallel_size\": 2}'",
    )
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """Options from command-line words; bad ones end the process with code 2, as argparse does."""
    parsed = build_parser().parse_args(arguments)
    is_url = parsed.target.startswith(("http://", "https://"))
    tasks = parsed.tasks
    if "all" in tasks:
        tasks = (*TASKS, CONTINUATION) if is_url else (*TASKS, CONTINUATION, TEXT)
    plan = Plan(
        tasks=tasks,
        contexts=parsed.context,
        items=parsed.items,
        modes=parsed.question or ((PREFILL,) if is_url else (DECODE, PREFILL)),
        budgets=parsed.budgets,
        seed=parsed.seed,
    )
    return Options(
        target=parsed.target,
        plan=plan,
        output=parsed.output,
        concurrency=parsed.concurrency,
        tokenizer=parsed.tokenizer,
        model_name=parsed.model_name,
        api_key=parsed.api_key,
        timeout=float(parsed.timeout),
        chat_template=parsed.chat_template,
        text=parsed.text,
        text_tokens=parsed.text_tokens,
        engine_args=parsed.engine_args,
        xargs=parsed.xargs,
    )


def main(arguments: Sequence[str]) -> int:
    """Run ``quest-vllm eval``; returns its exit code."""
    options = parse_options(arguments)
    command = shlex.join(["quest-vllm", "eval", *arguments])
    try:
        outcome = evaluate(options, command)
    except STOPS as why:
        return stop("eval", why, "interrupted; the same command goes on from here")
    if outcome.failed:
        print(f"quest-vllm eval: {outcome.failed} measurements failed; the same command retries them", file=sys.stderr)
        return SOME_FAILED
    return DONE
