"""How a served model does under load: throughput, and time to first and to each further token.

    python scripts/serve_bench.py --endpoint http://127.0.0.1:8000 --num-prompts 256 \\
        --max-concurrency 64 --input-len 512 --output-len 128         # closed loop: 64 clients
    python scripts/serve_bench.py --endpoint http://127.0.0.1:8000 --num-prompts 200 \\
        --request-rate 4 --tokenizer-name DIRECTORY --prompts HumanEval.jsonl

Requests come at once or at a rate (Poisson; --burstiness), at most --max-concurrency under way.
Prompts are random token ids, random texts of so many tokens where --tokenizer-name says how, or
those of a file: lines, or JSON lines with a `prompt` or a `question`. Each is streamed from
/v1/completions to its whole --output-len (`ignore_eos`). The JSON has the names of vLLM's `bench
serve`. Times are from when a request is sent; what it waits for --max-concurrency is queue_times. A
key comes from the environment's ROSEVAL_API_KEY.
"""

import argparse
import asyncio
import datetime
import json
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import installed  # noqa: E402, F401

import numpy as np  # noqa: E402

import cli  # noqa: E402
from durable import check_writable, write_json  # noqa: E402
from endpoints.client import KEY, Client, message_of, root_of  # noqa: E402
from endpoints.kinds import only_model  # noqa: E402
from endpoints.timing import timed  # noqa: E402
from inputs import read_jsonl, text_lines  # noqa: E402

PATH = "/v1/completions"


@dataclass
class Outcome:
    """Of one request; times in seconds, start after the first was due. arrivals: of its pieces,
    after it was sent. tokens: (read, written). error: why it has no answer."""

    start: float = 0.0
    queued: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)
    text: str = ""
    error: str = ""


Ask = Callable[[], Awaitable[Outcome]]


# ---------------------------------------------------------------------------------------------
# When


def offsets(n: int, rate: float, burstiness: float, seed: int) -> np.ndarray:
    """Seconds [n] after which each request is due: intervals of a gamma distribution (1: Poisson),
    stretched so that all n take n / rate seconds, as vLLM's do; all 0 at an infinite rate."""
    if math.isinf(rate):
        return np.zeros(n)
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), n))
    return due * (n / rate / due[-1])


async def run_load(
    asks: Sequence[Ask], due: Sequence[float], most: int | None
) -> tuple[list[Outcome], float]:
    """(what became of each, seconds in all): each is asked when it is due, if fewer than `most` are
    under way then."""
    loop = asyncio.get_running_loop()
    room, begin = asyncio.Semaphore(most or len(asks)), loop.time()

    async def one(ask: Ask, at: float) -> Outcome:
        await asyncio.sleep(max(0.0, begin + at - loop.time()))
        waits = loop.time()
        async with room:
            start = loop.time()
            try:
                outcome = await ask()
            except (OSError, ValueError, EOFError) as error:
                outcome = Outcome(error=f"{type(error).__name__}: {error}"[:300])
            outcome.start, outcome.queued = start - begin, start - waits
            return outcome

    outcomes = await asyncio.gather(*(one(ask, at) for ask, at in zip(asks, due)))
    return outcomes, loop.time() - begin


# ---------------------------------------------------------------------------------------------
# Who is asked


async def lines_of(url: str, headers: dict[str, str], body: bytes) -> AsyncIterator[bytes]:
    """The lines of a streamed answer as they arrive. ValueError for one that is no 200."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None
    )
    try:
        own = {"Host": parts.netloc, "Content-Length": str(len(body)), "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in (own | headers).items())
        writer.write(f"POST {parts.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await writer.drain()
        status = (await reader.readline()).split()
        told = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            told[name.lower()] = value.strip().lower()
        if len(status) < 2 or status[1] != b"200":
            raise ValueError(f"{b' '.join(status[1:]).decode()} {message_of(await reader.read())}")
        rest = b""
        async for part in _parts(reader, told.get("transfer-encoding") == "chunked"):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line
    finally:
        writer.close()


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    if not chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield (await reader.readexactly(size + 2))[:-2]


def asker(url: str, body: dict, headers: dict[str, str]) -> Ask:
    """What asks one request and notes when each piece of its answer came."""
    data = json.dumps(body).encode()

    async def ask() -> Outcome:
        found, begin, usage, ended = Outcome(), time.perf_counter(), {}, False
        async for line in lines_of(url + PATH, headers, data):
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if event.get("error"):
                raise ValueError(message_of(line[5:]))
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                ended |= bool(choice.get("finish_reason"))
                text = choice.get("text") or ""
                if text or not choice.get("finish_reason"):  # else it only says the end
                    found.arrivals.append(time.perf_counter() - begin)
                    found.text += text
        if not found.arrivals or not ended:
            raise ValueError("the stream broke off" if found.arrivals else "no piece of it came")
        written = usage.get("completion_tokens") or len(found.arrivals)
        found.tokens = (usage.get("prompt_tokens") or 0, written)
        return found

    return ask


# ---------------------------------------------------------------------------------------------
# What


def prompts_of(args: argparse.Namespace, tokenizer: Any, vocab_size: int) -> list[list[int] | str]:
    """So many, from the file over and over, or random ones."""
    n, rng = args.num_prompts, np.random.default_rng(args.seed)
    if args.prompts:
        if args.prompts.endswith(".jsonl"):
            rows = read_jsonl(args.prompts, "file of prompts")
            lines = [row.get("prompt") or row.get("question") for _, _, row in rows]
        else:
            lines = [line for _, line in text_lines(args.prompts) if line.strip()]
        if not lines or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"{args.prompts}: no prompts, or lines without `prompt` or `question`")
        return [lines[i % len(lines)] for i in range(n)]
    if tokenizer is None:
        return rng.integers(0, vocab_size, (n, args.input_len)).tolist()
    special = {*tokenizer.special_ids}
    plain = [i for i in range(tokenizer.vocab_size) if i not in special]
    drawn = rng.choice(plain, (n, args.input_len))
    return [tokenizer.decode(ids.tolist()) for ids in drawn]


# ---------------------------------------------------------------------------------------------
# What it amounts to


def report(outcomes: Sequence[Outcome], seconds: float, goals: dict[str, float]) -> dict[str, Any]:
    """Under vLLM's names; times of a request in seconds, of all in milliseconds. goals: upper
    limits of ttft, tpot and e2el in ms, for request_goodput."""
    good = [one for one in outcomes if not one.error]
    timings = [timed(0.0, one.arrivals, one.tokens[1]) for one in good]
    columns = {
        "ttft": [t.first or 0.0 for t in timings],
        "tpot": [t.per_token for t in timings if t.per_token is not None],
        "itl": [gap for t in timings for gap in t.gaps],
        "e2el": [t.whole for t in timings],
    }
    read, written = (sum(one.tokens[i] for one in good) for i in (0, 1))
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(good) / seconds,
        "output_throughput": written / seconds,
        "total_token_throughput": (read + written) / seconds,
        "max_output_tokens_per_s": _most_a_second(good),
        "max_concurrent_requests": _most_at_once(good),
    }
    if goals:
        within = [
            all(
                {"ttft": t.first, "tpot": t.per_token, "e2el": t.whole}[name] * 1e3 <= limit
                for name, limit in goals.items()
                if name != "tpot" or t.per_token is not None
            )
            for t in timings
        ]
        found["request_goodput"] = sum(within) / seconds
    for name, values in columns.items():
        ms = np.array(values or [0.0]) * 1e3
        found |= {f"mean_{name}_ms": float(ms.mean()), f"std_{name}_ms": float(ms.std())}
        found[f"median_{name}_ms"] = float(np.median(ms))
        found |= {f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in (90, 95, 99)}
    return found


def detailed(outcomes: Sequence[Outcome]) -> dict[str, list]:
    """Of each request, as vLLM's --save-detailed has it."""
    return {
        "input_lens": [one.tokens[0] for one in outcomes],
        "output_lens": [one.tokens[1] for one in outcomes],
        "ttfts": [one.arrivals[0] if one.arrivals else 0.0 for one in outcomes],
        "itls": [np.diff(one.arrivals).tolist() for one in outcomes],
        "latencies": [one.arrivals[-1] if one.arrivals else 0.0 for one in outcomes],
        "start_times": [one.start for one in outcomes],
        "queue_times": [one.queued for one in outcomes],
        "generated_texts": [one.text for one in outcomes],
        "errors": [one.error for one in outcomes],
    }


def _most_a_second(outcomes: Sequence[Outcome]) -> float:
    """Pieces in the fullest whole second."""
    at = [int(one.start + seconds) for one in outcomes for seconds in one.arrivals]
    return float(np.bincount(at).max()) if at else 0.0


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    starts = [(one.start, 1) for one in outcomes]
    ends = [(one.start + one.arrivals[-1], -1) for one in outcomes]
    now = most = 0
    for _, step in sorted(starts + ends):
        now += step
        most = max(most, now)
    return most


# ---------------------------------------------------------------------------------------------
# The command


def read_goals(words: Sequence[str]) -> dict[str, float]:
    """{name: milliseconds} of "ttft:200"."""
    goals = {}
    for word in words:
        name, _, limit = word.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not limit.replace(".", "", 1).isdigit():
            raise ValueError(f"--goodput {word}: like ttft:200 tpot:50 e2el:5000, milliseconds")
        goals[name] = float(limit)
    return goals


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """The whole record of a run."""
    goals = read_goals(args.goodput)
    client = Client(args.endpoint)
    model = args.model or only_model(client)
    tokenizer, size = None, args.vocab_size
    if args.tokenizer_name:
        from tokenizer import build_tokenizer

        tokenizer = build_tokenizer(args.tokenizer_name)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    same = {"model": model, "max_tokens": args.output_len, "temperature": args.temperature}
    same |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    if args.no_ignore_eos:
        del same["ignore_eos"]
    prompts = prompts_of(args, tokenizer, size)
    url = root_of(args.endpoint)
    asks = [asker(url, same | {"prompt": prompt}, headers) for prompt in prompts]
    due = offsets(len(asks), args.request_rate, args.burstiness, args.seed)
    outcomes, seconds = asyncio.run(run_load(asks, due.tolist(), args.max_concurrency))
    rate = "inf" if math.isinf(args.request_rate) else args.request_rate
    about = {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai",
        "model_id": model,
        "tokenizer_id": args.tokenizer_name,
        "num_prompts": len(prompts),
        "request_rate": rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }
    found = about | report(outcomes, seconds, goals)
    failed = [one.error for one in outcomes if one.error]
    if failed:
        cli.note(f"{len(failed)} of {len(outcomes)} requests failed; the first: {failed[0]}")
    return found | (detailed(outcomes) if args.save_detailed else {})


def show(found: dict[str, Any]) -> None:
    print(
        f"{found['completed']} requests in {found['duration']:.2f} s: "
        f"{found['request_throughput']:.2f} requests/s, {found['output_throughput']:.1f} tokens/s "
        f"({found['failed']} failed, {found['max_concurrent_requests']} at once at most)"
    )
    print(f"{'ms':6}{'mean':>10}{'median':>10}{'p90':>10}{'p99':>10}")
    for name in ("ttft", "tpot", "itl", "e2el"):
        cells = (found[f"{word}_{name}_ms"] for word in ("mean", "median", "p90", "p99"))
        print(f"{name:6}" + "".join(f"{cell:>10.2f}" for cell in cells))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    p.add_argument("--endpoint", required=True, metavar="URL")
    p.add_argument("--model", help="its name there; default: the only one")
    p.add_argument("--num-prompts", type=cli.positive_int, default=100)
    p.add_argument("--request-rate", type=float, default=math.inf, help="a second (inf)")
    p.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; more: more even")
    p.add_argument("--max-concurrency", type=cli.positive_int, help="requests under way")
    p.add_argument("--input-len", type=cli.positive_int, default=512, help="tokens (512)")
    p.add_argument("--output-len", type=cli.positive_int, default=128, help="tokens (128)")
    p.add_argument("--prompts", metavar="FILE", help="instead of random ones")
    p.add_argument("--tokenizer-name", metavar="DIRECTORY", help="random prompts are texts")
    p.add_argument("--vocab-size", type=cli.positive_int, default=250, help="of random ids (250)")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--no-ignore-eos", action="store_true", help="answers end where they end")
    p.add_argument("--goodput", nargs="*", default=[], metavar="NAME:MS")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-detailed", action="store_true", help="each request in --out too")
    p.add_argument("--out", metavar="FILE", help="the JSON of it")
    args = p.parse_args(argv)
    for name in ("request_rate", "burstiness"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{cli.flag_of(name)} must be above 0")
    if args.out:  # before minutes of work whose result it is to hold
        if Path(args.out).is_dir():
            raise ValueError(f"--out {args.out} is a directory: name a file in it")
        check_writable(Path(args.out).parent, "--out")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    found = bench(args)
    show(found)
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    cli.run(main)
