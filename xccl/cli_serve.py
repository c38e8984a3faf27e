"""The command ``xccl serve``: a small trained MoE language model, served by expert-parallel ranks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xccl

if TYPE_CHECKING:
    from rich.console import Console

    from xccl.moe_config import Quant
    from xccl.serving.exchange import StepReport
    from xccl.serving.request import Request
    from xccl.serving.service import ServiceOptions
    from xccl.serving.statistics import RankResult
    from xccl.serving.tokenizer import Tokenizer

_EXTRA_MODULES = ("safetensors", "tokenizers", "rich", "threadpoolctl")
_DEFAULT_MODEL = Path(__file__).parent / "serving" / "model"
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_HTTP_MODULES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
_SHOWN_REQUESTS = 8
_MAX_PORT = 65535
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do

_EPILOG = """\
Without --prompt and --file, prompts are read from standard input if that is a pipe, else built-in ones are used.
The same seed gives the same text on any number of ranks, at any --batch, with and without --mtp.
"""


class _InputError(Exception):
    """Something the user gave cannot be used; the message says what and what to do."""


def add_parser(subparsers: Any) -> None:
    """Add ``serve`` to the subcommands of xccl; :func:`main` runs it."""
    parser = subparsers.add_parser(
        "serve",
        help="serve text from a small MoE model, its experts spread over ranks",
        description="Serve text from a small MoE model whose experts are spread over ranks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-n", "--ranks", type=_positive, default=2, metavar="N", help="ranks to start (default 2)")
    parser.add_argument("--model", type=Path, default=_DEFAULT_MODEL, metavar="DIR", help="model folder")
    _add_input_arguments(parser)
    _add_engine_arguments(parser)
    _add_http_arguments(parser)
    parser.add_argument(
        "--check", action="store_true", help="also run one process without communication; demand the same tokens"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write texts and figures to F")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run ``xccl serve``: 0 if all went well, 1 if --check found a difference, 2 for wrong input.

    Raises what :func:`xccl.run` raises if a rank fails.
    """
    try:
        _require_extras(_EXTRA_MODULES if args.http is None else _EXTRA_MODULES + _HTTP_MODULES)
        return _serve(args) if args.http is None else _serve_http(args)
    except _InputError as error:
        sys.stderr.write(f"xccl serve: {error}\n")
        return 2
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and sampling")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue (repeatable)")
    group.add_argument("--file", metavar="F", help="prompts, one a line; - is standard input")
    group.add_argument("--requests", type=_positive, metavar="N", help="repeat the prompts in turn up to N requests")
    group.add_argument("--max-tokens", type=_positive, default=64, metavar="N", help="tokens a request (default 64)")
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default 1: off)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="key of the sampling noise (default 0)")


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--batch", type=_positive, default=64, metavar="N", help="concurrent requests (default 64)")
    group.add_argument(
        "--mtp", action=argparse.BooleanOptionalAction, default=True, help="speculative decoding (default on)"
    )
    group.add_argument("--quant", choices=("int8", "none"), default="int8", help="tokens in dispatch (default int8)")
    group.add_argument("--kv-blocks", type=_positive, metavar="N", help="KV cache of a rank, in blocks of 16 tokens")
    group.add_argument("--timeout", type=float, metavar="S", help="end all ranks after S seconds")


def _add_http_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP server (prompts come from clients, in OpenAI's format)")
    group.add_argument("--http", type=_port, metavar="PORT", help="serve at this port until Ctrl-C; 0 takes a free one")
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen at (default 127.0.0.1)")
    group.add_argument(
        "--queue", type=_positive, default=256, metavar="N", help="requests that may wait for a slot (default 256)"
    )
    group.add_argument("--api-key", metavar="KEY", help="what clients must send; @FILE reads it from a file")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to {_MAX_PORT}, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return value


def _require_extras(modules: Sequence[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise _InputError(f"{', '.join(missing)} not installed: run  pip install 'xccl[serve]'")


def _serve(args: argparse.Namespace) -> int:
    from rich.console import Console

    from xccl.serving.report import summary_table
    from xccl.serving.service import ServiceOptions
    from xccl.serving.statistics import summarise

    console = Console()
    prompts, requests, tokenizer = _prepare(args)
    options = ServiceOptions(
        model=args.model,
        batch=min(args.batch, len(requests)),
        mtp=args.mtp,
        quant=_quant(args),
        kv_blocks=args.kv_blocks,
    )
    results = xccl.run(_serve_rank, args.ranks, requests, options, prompts, timeout=args.timeout)
    summary = summarise(results)
    console.print(summary_table(summary))
    verdict = _check(console, requests, options, results, tokenizer) if args.check else None
    if args.json is not None:
        _write_json(args, prompts, tokenizer, results, asdict(summary), verdict)
    return 0 if verdict is None or verdict["passed"] else 1


def _serve_http(args: argparse.Namespace) -> int:
    from xccl.serving.http.front import FrontSettings
    from xccl.serving.http.launcher import listen, serve_http
    from xccl.serving.service import ServiceOptions

    given = [f"--{name}" for name in ("prompt", "file", "requests", "check", "json") if getattr(args, name)]
    if given:
        raise _InputError(f"{', '.join(given)} and --http exclude each other: clients send the prompts")
    _require_model(args.model)
    options = ServiceOptions(args.model, args.batch, args.mtp, _quant(args), args.kv_blocks)
    name = "tiny-moe" if args.model == _DEFAULT_MODEL else args.model.resolve().name
    settings = FrontSettings(args.model, name, args.kv_blocks, args.queue, _api_key(args.api_key))
    try:
        listener = listen(args.host, args.http)
    except OSError as error:
        raise _InputError(f"cannot listen at {args.host} port {args.http}: {error.strerror or error}") from error
    return serve_http(listener, args.ranks, options, settings, args.timeout)


def _api_key(given: str | None) -> str | None:
    """The key that clients must send; from a file, it does not show in the list of processes."""
    if given is None:
        return None
    try:
        key = Path(given[1:]).read_text() if given.startswith("@") else given
    except (OSError, UnicodeDecodeError) as error:
        raise _InputError(f"cannot read the key from {given[1:]}: {error}") from error
    if not key.strip():
        raise _InputError("--api-key is empty")
    return key.strip()


def _prepare(args: argparse.Namespace) -> tuple[list[str], list[Request], Tokenizer]:
    """Check everything the user gave; returns the prompt of each request, the requests, and the tokenizer."""
    from xccl.serving.config import ModelConfig
    from xccl.serving.prompts import PromptError, collect_prompts, make_requests
    from xccl.serving.request import SamplingParams
    from xccl.serving.tokenizer import Tokenizer

    _require_model(args.model)
    if args.json is not None and not args.json.parent.is_dir():
        raise _InputError(f"cannot write {args.json}: no such folder")
    try:
        sampling = SamplingParams(args.max_tokens, args.temperature, args.top_p, args.seed)
        config = ModelConfig.load(args.model / "config.json")
        tokenizer = Tokenizer.load(args.model / "tokenizer.json", config.eot_token)
        prompts = collect_prompts(args.prompt, args.file, sys.stdin)
        requests = make_requests(prompts, args.requests, sampling, tokenizer, config)
    except (PromptError, ValueError) as error:
        raise _InputError(str(error)) from error
    _check_kv_blocks(args.kv_blocks, requests, config.max_context)
    return [prompts[i % len(prompts)] for i in range(len(requests))], requests, tokenizer


def _require_model(folder: Path) -> None:
    missing = [name for name in _MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise _InputError(f"model folder {folder} has no {', '.join(missing)}")


def _quant(args: argparse.Namespace) -> Quant:
    return None if args.quant == "none" else "int8"


def _check_kv_blocks(kv_blocks: int | None, requests: Sequence[Request], max_context: int) -> None:
    from xccl.serving.kv_cache import blocks_for
    from xccl.serving.running import length_limit

    needed = max(blocks_for(length_limit(request, max_context)) for request in requests)
    if kv_blocks is not None and kv_blocks < needed:
        raise _InputError(f"--kv-blocks {kv_blocks} is too small: the longest request needs {needed} blocks")


def _serve_rank(
    comm: xccl.Communicator, requests: Sequence[Request], options: ServiceOptions, prompts: Sequence[str]
) -> RankResult:
    """One rank of the run; rank 0 writes the texts."""
    from rich.console import Console

    from xccl.serving.config import ModelConfig
    from xccl.serving.service import serve_rank
    from xccl.serving.streaming import TextPrinter
    from xccl.serving.tokenizer import Tokenizer

    printer = None
    if comm.rank == 0:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads the texts has gone: end without a traceback
        config = ModelConfig.load(options.model / "config.json")
        tokenizer = Tokenizer.load(options.model / "tokenizer.json", config.eot_token)
        printer = TextPrinter(Console(), requests, prompts, tokenizer, config, _SHOWN_REQUESTS)
    return serve_rank(comm, requests, options, printer)


def _check(
    console: Console,
    requests: Sequence[Request],
    options: ServiceOptions,
    results: Sequence[RankResult],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Run the reference, say in words whether the texts are the same and how the speeds compare."""
    from xccl.serving.check import first_difference
    from xccl.serving.config import ModelConfig
    from xccl.serving.report import counted
    from xccl.serving.service import serve_reference
    from xccl.serving.statistics import summarise
    from xccl.serving.streaming import TokenBar

    bar = TokenBar(console, "single-process reference", requests, ModelConfig.load(options.model / "config.json"))

    def show(report: StepReport) -> None:
        bar.count(report)
        bar.draw()

    reference = serve_reference(requests, options, show)
    difference = first_difference([output for result in results for output in result.outputs], reference.outputs)
    ranks, single = summarise(results), summarise([reference])
    ratio = ranks.tokens_per_second / single.tokens_per_second
    stable = reference.row_stable and all(result.row_stable for result in results)
    if difference is None:
        console.print(
            f"check passed: {ranks.requests} requests, {ranks.tokens} tokens, all the same as those of one process "
            "without communication",
            soft_wrap=True,
        )
    else:
        got, expected = (
            "the end" if token is None else f"{token} {tokenizer.decode([token])!r}"
            for token in (difference.got, difference.expected)
        )
        console.print(
            f"check {'failed' if stable else 'found a difference'}: request {difference.request_id} differs at its "
            f"token {difference.index}: {got}, one process says {expected}",
            highlight=False,
            soft_wrap=True,
        )
    if not stable:
        console.print(
            "This BLAS gives a row other bits in another batch, so equality cannot be demanded here; a difference "
            "is no failure.",
            soft_wrap=True,
        )
    console.print(
        f"{counted(len(results), 'rank')}: {ranks.tokens_per_second:.0f} tokens/s, one process: "
        f"{single.tokens_per_second:.0f} tokens/s at the same batch, ratio {ratio:.2f}",
        soft_wrap=True,
    )
    return {
        "passed": difference is None or not stable,
        "same_tokens": difference is None,
        "row_stable_blas": stable,
        "difference": None if difference is None else asdict(difference),
        "single_process": asdict(single),
        "speed_ratio": ratio,
    }


def _write_json(
    args: argparse.Namespace,
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    results: Sequence[RankResult],
    summary: dict[str, Any],
    verdict: dict[str, Any] | None,
) -> None:
    outputs = sorted((o for result in results for o in result.outputs), key=lambda output: output.request_id)
    names = ("ranks", "batch", "mtp", "quant", "max_tokens", "temperature", "top_p", "seed")
    document = {
        "options": {"model": str(args.model), **{name: getattr(args, name) for name in names}},
        "summary": summary,
        "check": verdict,
        "requests": [
            {
                "id": output.request_id,
                "prompt": prompts[output.request_id],
                "text": tokenizer.decode(output.tokens),
                "tokens": output.tokens,
                "finish_reason": output.finish_reason,
                "time_to_first_token": output.time_to_first_token,
                "time_per_output_token": output.time_per_output_token,
            }
            for output in outputs
        ],
    }
    try:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise _InputError(f"cannot write {args.json}: {error}") from error
