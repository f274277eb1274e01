"""serve.py beside `transformers serve`, and beside our engine without HTTP, in one run on one GPU.

    python benchmarks/serving_gpu.py --tokenizer DIRECTORY --out benchmarks/results/serving.json
    python benchmarks/serving_gpu.py --tokenizer DIRECTORY --small --out /tmp/s.json    # on a CPU

A 7B Llama shape in bfloat16 with random weights, written once under --work with the tokenizer's
files and no end-of-text token; prompts of some 512 tokens, 128 new ones, greedy. The same requests
in a closed loop of 1, 8, 64 and 256 clients (scripts/serve_bench.py), one or two for each; the
engine draws what 256 clients ask for, all asked at once, and so does `generate`, which cuts them
into units. What each server answers to the same prompt among more clients is compared. The peer
runs with continuous batching and needs fastapi, uvicorn and openai, serve.py starlette and uvicorn.
Each part has --budget seconds: no load starts after them. A part that fails is reported and the
others go on.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
import serve_bench  # noqa: E402
import torch  # noqa: E402

import cli  # noqa: E402
from durable import write_json  # noqa: E402

CLIENTS = {1: 1, 8: 1, 64: 2, 256: 2}  # how many requests of each
WARM = 8  # requests before each part's loads
PORT = 18765
SHAPES = {  # of Llama-2-7B; and one for a rehearsal
    False: dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=32),
    True: dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip


def write_checkpoint(path: Path, tokenizer: str, small: bool, device: str) -> None:
    """Random weights, once."""
    import transformers

    if (path / "config.json").exists():
        return
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,  # the peer knows no `ignore_eos`
        **SHAPES[small],
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="2GB")


@contextlib.contextmanager
def started(words: list[str], log: Path, **variables: str) -> Iterator[None]:
    """A server that answers /health."""
    with (
        open(log, "w") as file,
        subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | variables) as process,
    ):
        try:
            while True:
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health").close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def loads(
    args: argparse.Namespace, model: str, prompts: list[str], until: float, **fields: Any
) -> dict:
    """{clients: what serve_bench finds}; fields: of each request, beside the usual ones."""
    url, headers = f"http://127.0.0.1:{PORT}", {"Content-Type": "application/json"}
    same = {"model": model, "temperature": 0, "stream": True} | fields
    same |= {"stream_options": {"include_usage": True}, "max_tokens": args.output_len}
    answers: dict[str, str] = {}  # by prompt, of the fewest clients

    def run(asked: list[str], clients: int, **changes: Any) -> tuple[list, float]:
        bodies = [same | {"prompt": prompt} | changes for prompt in asked]
        asks = [serve_bench.asker(url, body, headers) for body in bodies]
        return asyncio.run(serve_bench.run_load(asks, [0.0] * len(asks), clients))

    run(prompts[-WARM:], WARM, max_tokens=4)  # what is compiled and allocated once
    found = {}
    before = 0  # prompts of the load before this one
    for clients, each in CLIENTS.items():
        if time.perf_counter() > until:
            print(f"  {clients} clients: no time left", flush=True)
            continue
        asked = prompts[: each * clients]
        outcomes, seconds = run(asked, clients)
        found[str(clients)] = one = serve_bench.report(outcomes, seconds, {})
        one["first_error"] = next((o.error for o in outcomes if o.error), None)
        pairs = [(answers.setdefault(p, o.text), o.text) for p, o in zip(asked, outcomes)]
        one["same_answers"] = [sum(a == b for a, b in pairs[:before]), before]
        print(
            f"  {clients:3} clients: {one['output_throughput']:9.1f} tokens/s, TTFT "
            f"{one['median_ttft_ms']:8.1f} ms, TPOT {one['median_tpot_ms']:7.2f} ms, p99 of a "
            f"request {one['p99_e2el_ms']:9.1f} ms, {one['failed']} failed; answers as among fewer "
            f"clients: {one['same_answers'][0]} of {before}",
            flush=True,
        )
        before = len(asked)
    return found


def longest(args: argparse.Namespace, prompts: list[str]) -> int:
    from tokenizer import build_tokenizer

    return max(map(len, build_tokenizer(args.work / "model").encode_batch(prompts)))


def ours(args: argparse.Namespace, prompts: list[str], until: float) -> dict:
    words = [sys.executable, str(ROOT / "serve.py"), "--checkpoint-path", str(args.work / "model")]
    words += ["--port", str(PORT), "--device", args.device, "--model-name", "model"]
    words += ["--context", str(longest(args, prompts) + args.output_len)]
    words += ["--max-new-tokens", str(args.output_len), "--compile", args.compile]
    words += ["--max-rows", str(args.max_rows)] if args.max_rows else []
    words += ["--dtype", "bf16" if args.device == "cuda" else "fp32"]
    with started(words, args.work / "ours.log"):
        return loads(args, "model", prompts, until, ignore_eos=True)


def peer(args: argparse.Namespace, prompts: list[str], until: float) -> dict:
    model = str(args.work / "model")
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    words += ["--port", str(PORT), "--device", args.device, "--continuous-batching"]
    words += ["--dtype", "bfloat16" if args.device == "cuda" else "float32"]
    if args.small:  # else it takes most of the machine's memory
        words += ["--cb-num-blocks", "64", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    (args.work / "hub").mkdir(exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(args.work / "hub")}
    with started(words, args.work / "peer.log", **offline):
        return loads(args, model, prompts, until)


def drawn(args: argparse.Namespace, prompts: list[str], through_generate: bool) -> dict:
    """What the most clients ask for, all at once, of an engine that is there already, or of
    `generate`, which makes its own."""
    from backends import Sampling
    from backends.engine import Engine, default_batch_size, generate
    from backends.rows import Capacity
    from checkpoint import load_model
    from tokenizer import build_tokenizer

    dtype = "bfloat16" if args.device == "cuda" else "float32"
    model = load_model(args.work / "model", dtype, args.device)
    ids = [x.tolist() for x in build_tokenizer(args.work / "model").encode_batch(prompts)]
    sampling, most = Sampling(max_new_tokens=args.output_len), max(map(len, ids))
    rows = args.max_rows or default_batch_size(model, most, args.output_len)
    compiled = args.compile == "on"
    if not through_generate:
        capacity = Capacity(rows, most, args.output_len)
        drawer = Engine(model, capacity, features=frozenset(), compiled=compiled)

    def draw(asked: list[list[int]]) -> int:
        if through_generate:
            samples = generate(model, asked, sampling, batch_size=rows, compile=compiled)
            return sum(len(sample.token_ids) for sample in samples)
        for i, prompt in enumerate(asked):
            drawer.submit(i, prompt, sampling)
        tokens = 0
        while drawer.busy:
            tokens += sum(len(sample.token_ids) for sample in drawer.step().finished)
        return tokens

    draw(ids[-WARM:])
    start = time.perf_counter()
    tokens = draw(ids)
    seconds = time.perf_counter() - start
    print(f"  {tokens / seconds:9.1f} tokens/s, {rows} rows", flush=True)
    found = {"rows": rows, "tokens": tokens, "seconds": seconds}
    return found | {"output_throughput": tokens / seconds}


def engine(args: argparse.Namespace, prompts: list[str], until: float) -> dict:
    return drawn(args, prompts, False)


def through_generate(args: argparse.Namespace, prompts: list[str], until: float) -> dict:
    return drawn(args, prompts, True)


PARTS: dict[str, Callable[..., dict]] = {
    "ours": ours,
    "peer": peer,
    "engine": engine,
    "generate": through_generate,
}


def texts(tokenizer: str, n: int, length: int) -> list[str]:
    """Random ones, of about so many tokens."""
    from tokenizer import build_tokenizer

    words = build_tokenizer(tokenizer)
    special = {*words.special_ids}
    plain = [i for i in range(words.vocab_size) if i not in special]
    drawn = np.random.default_rng(0).choice(plain, (n, length)).tolist()
    return [words.decode(words.encode(words.decode(ids))[:length]) for ids in drawn]


def main(argv: list[str] | None = None) -> None:
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tokenizer", required=True, help="a directory of Hugging Face files")
    p.add_argument("--work", type=Path, default=Path("/dev/shm/roseval-serving"))
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    p.add_argument("--small", action="store_true", help="tiny shapes, 1 and 8 clients")
    p.add_argument("--input-len", type=int, default=512)
    p.add_argument("--output-len", type=int, default=128)
    p.add_argument("--max-rows", type=int, help="of ours (as memory allows)")
    p.add_argument("--compile", default="off", choices=("on", "off"))
    p.add_argument("--budget", type=float, default=120, help="seconds of a part")
    args = p.parse_args(argv)
    args.device = "cpu" if args.small and not torch.cuda.is_available() else "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU here: --small rehearses on a CPU")
    if args.small:
        args.input_len, args.output_len, args.max_rows, args.compile = 48, 8, 8, "off"
        globals()["CLIENTS"] = {1: 2, 8: 2}
    args.work.mkdir(parents=True, exist_ok=True)
    write_checkpoint(args.work / "model", args.tokenizer, args.small, args.device)
    prompts = texts(args.tokenizer, max(c * n for c, n in CLIENTS.items()), args.input_len)
    report = {"torch": torch.__version__, "small": args.small, "input_len": args.input_len}
    report |= {"output_len": args.output_len, "max_rows": args.max_rows, "compile": args.compile}
    report["gpu"] = torch.cuda.get_device_name() if args.device == "cuda" else None
    report["parts"] = {}
    for name in args.parts:
        print(name, flush=True)
        start = time.perf_counter()
        try:
            found = PARTS[name](args, prompts, start + args.budget)
        except Exception as error:  # an edge: the other parts still have something to say
            traceback.print_exc()
            found = {"error": cli.reason_of(error)}
        report["parts"][name] = found | {"whole_s": time.perf_counter() - start}
        gc.collect()
        torch.cuda.empty_cache()
        write_json(args.out, report)
        print(f"  [{report['parts'][name]['whole_s']:.0f} s]", flush=True)
    print(json.dumps({"written": str(args.out)}))


if __name__ == "__main__":
    cli.run(main)
