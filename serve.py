"""A checkpoint behind OpenAI's API, on one GPU or CPU: for harnesses, notebooks, and people.

    python serve.py --checkpoint-path checkpoints/checkpoint-1000 --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Once upon", "max_tokens": 16, "temperature": 0}'
    lm_eval --model local-completions --tasks gsm8k --model_args \\
        model=checkpoint-1000,base_url=http://127.0.0.1:8000/v1/completions,max_length=1024

Needs `pip install starlette uvicorn`. Requests join the rows that are running; prompts that are to
be scored (echo with logprobs) run as batches between. A sample is a function of (seed, tokens of
the prompt, its index): its neighbours do not change it. Listens on this machine alone unless --host
says otherwise; `torchrun --nproc-per-node=8 serve.py --port-base 8000 …` is a server on each GPU,
all of the same model; `torchrun --nproc-per-node=2 serve.py --shard 2 …` is one, whose model two
GPUs hold between them. With ROSEVAL_API_KEY in the environment, clients must show that key. SIGTERM
takes no more requests, finishes those that are there, and ends.
"""

import contextlib
import functools
import os
import signal
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import installed  # noqa: F401

import cli
import evaluation
import launcher
from backends import BATCH_TOKENS, CacheOptions
from evaluation import ModelOptions
from quantisation.names import Quantisation

if TYPE_CHECKING:
    from checkpoint import Checkpoint
    from distributed import Dist
    from serving.asked import Served
    from serving.service import Service
    from serving.work import Work
    from transformers_model import Model

KEY = "ROSEVAL_API_KEY"
KEEP_ALIVE = 75  # seconds; clients come back to a connection for 15 and more
CPU_ROWS = 8
NEW_TOKENS = 2048


@dataclass(frozen=True)
class Options:
    """Where it listens and what it has room for."""

    checkpoint_path: str = cli.option(help="a checkpoint's file or directory", metavar="PATH")
    config: str | None = cli.option(
        None, "the model's shape, for old checkpoint files that hold none"
    )
    base: str | None = cli.option(
        None, "the base of an adapter; default: as it names it", metavar="PATH"
    )
    tokenizer_name: str | None = cli.option(
        None, "byte, a tiktoken name or a local directory; default: the checkpoint's own"
    )
    model_name: str | None = cli.option(
        None, "what clients call it; default: the checkpoint's name", metavar="NAME"
    )
    host: str = cli.option("127.0.0.1", "address to listen on (127.0.0.1: this machine alone)")
    port: int = cli.option(8000, "0: any that is free (8000)", type=int)
    port_base: int | None = cli.option(
        None, "under torchrun: a server on each GPU, on this port and those that follow", type=int
    )
    shard: int | str = cli.option(
        1,
        "processes that hold the model between them, layer by layer, where a GPU is too small for "
        "it: all that torchrun starts; auto: as few as hold it (1)",
        type=cli.shards,
        metavar="K",
    )
    bos: str = evaluation.bos_option()
    context: int | None = cli.option(
        None, "tokens of a prompt and its answer (the model's own)", type=cli.positive_int
    )
    max_new_tokens: int | None = cli.option(
        None, f"of an answer at most ({NEW_TOKENS}, or the context)", type=cli.positive_int
    )
    max_rows: int | None = cli.option(
        None, "sequences drawn at a time (as memory allows; 8 on a CPU)", type=cli.positive_int
    )
    max_queue: int = cli.option(
        1024, "sequences that may wait; more are told to come again (429)", type=cli.positive_int
    )
    max_logprobs: int = cli.option(
        20, "of the likeliest tokens that a client may ask for", type=cli.positive_int
    )
    max_body: int = cli.option(
        16 << 20, "bytes of a request at most (16777216)", type=cli.positive_int
    )
    return_all_prompt_logprobs: bool = cli.option(
        False, "lightllm's /generate tells those of the prompt, as OpenCompass needs"
    )
    drain_seconds: int = cli.option(
        120, "that SIGTERM waits for what is on its way (120)", type=cli.positive_int
    )
    quantise: str | None = cli.option(
        None, "the rule by which weights are rounded, as evaluations do", metavar="RULE"
    )
    cache: CacheOptions = CacheOptions()  # noqa: RUF009
    compile: str = cli.option(
        "off", "torch.compile of the decode step: a minute's start", choices=("on", "off")
    )


def open_model(
    options: Options, precision: cli.PrecisionOptions, dist: "Dist"
) -> "tuple[Served, Work]":
    """The checkpoint that the options name, and what answers for it on this rank."""
    import checkpoint
    from backends.local import facts_of
    from backends.rows import Capacity
    from serving.asked import Served
    from serving.texts import Texts
    from serving.work import Work
    from tasks.drawing import end_tokens

    rule = options.quantise and Quantisation(options.quantise)
    models = ModelOptions(
        config=options.config, base=options.base, tokenizer_name=options.tokenizer_name
    )
    path, *others = checkpoint.expand_paths((options.checkpoint_path,))
    if others:
        raise ValueError(
            f"--checkpoint-path {options.checkpoint_path} holds {1 + len(others)} checkpoints; a "
            f"server has one: {others[-1]}, say"
        )
    ckpt = models.opened(path)
    dtype = evaluation.set_precision(precision, dist)
    tokenizer = evaluation.pick_tokenizer(options.tokenizer_name, ckpt, needed=True)
    assert tokenizer is not None, "needed"
    facts = facts_of(ckpt, tokenizer, dtype, dist.device.type)
    evaluation.check_vocabulary(max(tokenizer.encode("a")), facts)
    model, dist = load(ckpt, dtype, dist, options.shard, rule or None)
    context = read_context(options.context, facts.context)
    new_tokens = read_new_tokens(options.max_new_tokens, context)
    room, kv_dtype = prompt_room(model, context, new_tokens), options.cache.kv_dtype
    rows = options.max_rows or rows_that_fit(model, room or context, new_tokens, kv_dtype, dist)
    texts = Texts(tokenizer, facts.vocab_size, evaluation.resolve_bos(options.bos, tokenizer))
    logprobs = min(options.max_logprobs, facts.vocab_size)
    rounded = [*([rule.rule] if rule else []), *([f"kv-{kv_dtype}"] if kv_dtype else [])]
    capacity = Capacity(
        *(rows, context, new_tokens), prompt_room=room, steady=True, kv_dtype=kv_dtype
    )
    work = Work(
        *(model, texts, capacity, end_tokens(facts)),
        logprobs=logprobs,
        batch_tokens=BATCH_TOKENS[dist.device.type],
        compiled=options.compile == "on",
        dist=dist,
    )
    served = Served(
        name=options.model_name or "-".join([ckpt.name, *rounded]),
        texts=texts,
        context=context,
        new_tokens=new_tokens,
        logprobs=logprobs,
        sequences=rows + options.max_queue,
        dtype=dtype,
        template=tokenizer.chat_templates.get("default"),
    )
    return served, work


def load(
    ckpt: "Checkpoint", dtype: str, dist: "Dist", shard: int | str, rule: Quantisation | None
) -> "tuple[Model, Dist]":
    """The model, or this rank's part of it, and the ranks that hold it between them."""
    from backends import parallel
    from formats import filling
    from quantisation.apply import Rounding

    n, at_once = dist.world_size, rule if ckpt.base is None else None
    packed = functools.partial(filling.block_bytes, ckpt, dtype) if rule is None else None
    dist = parallel.in_groups(dist, shard, ckpt.config, dtype, at_once, packed)
    if dist.group_size != n:
        raise wrong_number(dist.group_size, n)
    rounding = Rounding(rule) if rule else None
    model = parallel.load(ckpt, dtype, dist, rounding=rounding)
    if rounding:
        rounding.finish(model)
    return model, dist


def rows_that_fit(
    model: "Model", prompt: int, new_tokens: int, kv_dtype: str | None, dist: "Dist"
) -> int:
    """The same number on all ranks, whatever cards they have."""
    from backends import engine

    if dist.device.type == "cpu":
        return CPU_ROWS
    rows = engine.default_batch_size(model, prompt, new_tokens, kv_dtype=kv_dtype, by_turns=False)
    return min(dist.gather(rows))


def prompt_room(model: Any, context: int, new_tokens: int) -> int:
    """Tokens of a prompt that are kept beside its rows: what a longer one has more takes room that
    its answer, which shares the context, leaves in its row. 0: all, as latents need it."""
    latent = model.supports_cache and model.config.kv_lora_rank is not None
    return 0 if latent else max(context - new_tokens, context // 2)


def read_context(wanted: int | None, own: int | None) -> int:
    if wanted and own and wanted > own:
        raise ValueError(f"--context {wanted}: the model has {own} positions")
    if not (wanted or own):
        raise ValueError("nobody says how many positions the model has: --context N")
    return wanted or own or 0


def read_new_tokens(wanted: int | None, context: int) -> int:
    if wanted and wanted > context:
        raise ValueError(f"--max-new-tokens {wanted}: a prompt and its answer have {context}")
    return wanted or min(NEW_TOKENS, context)


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address that nobody listens on. ValueError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on --host {host} --port {port}: {reason}") from None
    return listener


def serve(options: Options, listener: socket.socket, served: "Served", service: "Service") -> None:
    """Until a signal, or until the engine ends, whose error is raised then. Of a signal nothing is
    left where ranks hold the model between them: they end together, once all is answered."""
    import uvicorn

    from serving.routes import Door, make_app

    work, key = service.work, os.environ.get(KEY) or None
    if key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        cli.note(f"whoever reaches {options.host} may ask: {KEY} in the environment asks for a key")
    door = Door(key, options.max_body, options.return_all_prompt_logprobs)
    config = uvicorn.Config(
        make_app(served, service, door),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=options.drain_seconds,
    )
    server = uvicorn.Server(config)
    service.on_error = lambda: setattr(server, "should_exit", True)
    listener.listen(128)  # not before there is somebody to answer
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"{cli.printable(served.name)} on http://{shown}:{port}/v1: context {served.context:,}, "
        f"answers to {served.new_tokens:,} tokens, {work.capacity.rows} rows, "
        f"{served.dtype}, {'chats' if served.template else 'no chat template'}"
        f"{f', over {work.dist.world_size} processes' if work.dist.pipe else ''}"
        f"{', key asked for' if key else ''}",
        flush=True,
    )
    signal.set_wakeup_fd(-1)  # cli would end us a few seconds after a signal: we drain
    try:
        server.run(sockets=[listener])
    except (SystemExit, KeyboardInterrupt):  # which the server raises again when it has ended
        if not (service.error or (work.dist.pipe and service.ended)):
            raise
    if service.error is not None:
        raise service.error


def lead(options: Options, listener: socket.socket, served: "Served", work: "Work") -> None:
    """serve(), with the other ranks that hold the model, if any."""
    from serving.ranks import Leader
    from serving.service import Service

    leader = Leader(work.dist) if work.dist.pipe else None
    try:
        serve(options, listener, served, Service(work, options.max_queue, leader))
    except BaseException:
        if leader is not None:
            leader.dismiss()
        raise


def check_processes(options: Options) -> None:
    """ValueError where so many processes are no server, before they look for each other."""
    n, shard = launcher.check_launch().world_size, options.shard
    if options.port_base is not None:
        if shard != 1:
            raise ValueError("--port-base is a whole model on each GPU: without --shard")
    elif shard not in (n, "auto"):
        raise wrong_number(int(shard), n)


def wrong_number(shard: int, n: int) -> ValueError:
    if shard == 1:
        return ValueError(
            f"{n} processes, and a server of one: start it without torchrun, or with --port-base, "
            f"a server on each GPU, or with --shard {n}, one whose model they hold between them"
        )
    return ValueError(
        f"a server of --shard {shard} is {shard} processes, not {n}: torchrun --nproc-per-node="
        f"{shard} serve.py --shard {shard} …, once for each server; or --port-base instead of "
        "--shard, a server on each GPU"
    )


def check_installed() -> None:
    """ValueError where the server's packages are not there."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serve.py needs {error.name}: pip install starlette uvicorn") from None


def main(argv=None):
    p = cli.parser(__doc__)
    cli.add_options(p, Options, cli.PrecisionOptions, cli.RunOptions)
    args = p.parse_args(argv)
    options = cli.read_options(Options, args)
    precision = cli.read_options(cli.PrecisionOptions, args)
    where = cli.read_options(cli.RunOptions, args)
    check_installed()
    check_processes(options)
    if options.port_base is not None:
        cli.check_unused(args, ("port",), "without --port-base, which says all ports")
        place = launcher.launch().local_rank
        options = replace(options, port=options.port_base + place)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}  # each alone: they share nothing
    # what is taken is said before a model is read
    listener = bind(options.host, options.port) if launcher.rank() == 0 else None
    with listener or contextlib.nullcontext():
        import distributed

        with distributed.setup(where.device, where.timeout) as dist:
            served, work = open_model(options, precision, dist)
            if listener is not None:
                lead(options, listener, served, work)
            else:
                from serving.ranks import Follower

                Follower(dist).follow(work)
            dist.barrier()


if __name__ == "__main__":
    cli.run(main)
