"""A torch model on these ranks as the three verbs: native or transformers', whatever is inside.

    backend = Local(model, tokenizer)                             # in memory, on this process alone
    backend = Local(model, facts=facts_of(ckpt, ...), dist=dist, compile="auto")

Kept here and nowhere else: compiled or eager, batches that are halved until memory holds them,
warm-up, what NaN does, and what it all cost.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

import cli
from backends import (
    BATCH_TOKENS,
    CacheOptions,
    Facts,
    Sample,
    Sampling,
    continuations,
    engine,
    scoring,
    strips,
)
from config import GPTConfig
from costs import gpus
from costs.flops import count_parameters, estimate_flops
from costs.shards import part
from distributed import Dist, print0
from gpu_kernels.elementwise import ACTIVATIONS
from modeling.attention import turns_normed
from quantisation.names import Quantisation
from tokenizer import Tokenizer
from transformers_model import Model

if TYPE_CHECKING:
    import checkpoint
    from backends import AnyWindows
    from dataset import TokenStream

T = TypeVar("T")

# What compiling saves is launches, and memory traffic between products, in proportion to layers x
# width; what it costs is nearly the same for every size, since all blocks share one compilation
SAVED_SECONDS_PER_UNIT = 4e-11  # a token, a layer, a channel: H200, bfloat16, 124M to 7B
COMPILE_SECONDS = 8.0
# Tokens x weights of a block for which a GPU takes longer than its host takes to launch the kernels
# one by one: half of GPT-2 124M's 32 x 1024, H100
BUSY = 1.2e11
WITH_COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}  # engine's words
OUT_OF_MEMORY = "out of memory with a batch of one: shorter sequences or a smaller --dtype help"


def facts_of(
    ckpt: "checkpoint.Checkpoint",
    tokenizer: Tokenizer | None,
    dtype: str,
    device: str,
    quantisation: Quantisation | None = None,
) -> Facts:
    """What a checkpoint's handle tells of the model that it will load, and how it is rounded."""
    return Facts(
        name=ckpt.name,
        vocab_size=ckpt.vocab_size,
        context=ckpt.context,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        shares_prefixes=ckpt.native,
        quantisation=quantisation,
    )


def facts_in_memory(model: Model, tokenizer: Tokenizer | None) -> Facts:
    """The same of a model that is there: GPTModel, or transformers' behind its interface."""
    parameter, held = next(model.parameters()), getattr(model, "quantisation", None)
    return Facts(
        name="in-memory",
        vocab_size=model.vocab_size,
        context=model.max_positions,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        tokenizer=tokenizer,
        shares_prefixes=model.supports_cache,
        quantisation=held and Quantisation(held["rule"], held["embeddings"], tuple(held["skip"])),
    )


class Local:
    """See the file's docstring; the verbs are those of backends.Backend.

    compile: "auto" (on CUDA, if the work is long enough to repay it), "on" or "off". cache: of
    `generate` (kvcache.py). n_jobs: how many jobs like each one will share a compilation,
    for "auto". Whether a verb compiles is decided
    from the whole job, so that every rank and every world size agree.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        *,
        facts: Facts | None = None,
        dist: Dist | None = None,
        compile: str = "auto",
        cache: CacheOptions = CacheOptions(),  # noqa: B008
        n_jobs: float = 1,
    ):
        self.model, self.compile, self.n_jobs = model, compile, n_jobs
        self.cache = cache
        self.facts = facts or facts_in_memory(model, tokenizer)
        self.dist = dist or Dist(0, 1, 0, next(model.parameters()).device)
        self.config = model.config if model.is_native else None
        self._cost: dict = {}
        self._ran: dict = {}
        self._flops: float | None = None

    # -- The verbs ----------------------------------------------------------------------------

    def score_windows(
        self,
        stream: "TokenStream",
        windows: "AnyWindows",
        batch_size: int = 8,
        *,
        per_token: bool = False,
        consumer: scoring.Consumers | None = None,
        keep_states: scoring.StatesConsumer | None = None,
    ) -> scoring.WindowTotals:
        """Nats of every window of a dataset.TokenStream; per_token, keep_states: as in
        scoring.py. consumer: makes a scoring.Consumer. Where a batch does not fit, all begins anew
        with half of it, and with another consumer; keep_states sees everything again, and must
        write by place. ValueError where the model gives NaN or infinite losses."""
        batch_size, device = min(batch_size, len(windows)), self.dist.device
        if windows.mark is not None and self.config is None:
            raise ValueError(
                "--documents: this architecture runs through transformers, where attention cannot "
                "be told where documents end; score it without"
            )
        compiled = self.should_compile(windows, batch_size)
        token_bytes, special = scoring.bytes_of_tokens(self.facts)
        seconds = {}

        def score(b):
            see = consumer() if consumer else None
            nll_fn = scoring.nll_function(self.model, compiled, see, keep_states)
            start = time.perf_counter()
            zeros = torch.zeros(b, windows.seq_len, dtype=torch.int64, device=device)
            scoring.agree_on_memory(lambda: self._warm_up(nll_fn, zeros, windows.mark), self.dist)
            seconds["warm_up_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            with cli.progress(-(-len(windows) // b), "windows", "batch") as bar:
                totals = scoring.score_windows(
                    *(nll_fn, stream, windows, b, self.dist, token_bytes, special, bar, per_token)
                )
            seconds["seconds"] = time.perf_counter() - start
            return totals

        self._reset_peak()
        totals, used = halve_until_it_fits(score, batch_size)
        if not np.isfinite(totals.nll).all():
            bad = totals.window[~np.isfinite(totals.nll)]
            raise ValueError(
                "the model gives NaN or infinite losses, first in window "
                f"{bad[0]}; no score is written"
            )
        flops = None
        if self.config is not None:
            every = estimate_flops(self.config, len(windows), windows.seq_len)
            flops = every["forward_causal"]
        rate = {"tokens_per_second": int(totals.tokens.sum()) / seconds["seconds"]}
        self._note(seconds | rate, flops, batch_size=used, compiled=compiled)
        return totals

    def score_rows(
        self,
        rows: continuations.Continuations,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        *,
        greedy: bool = False,
        consumer: scoring.Consumers | None = None,
    ) -> continuations.RowScores:
        """Log-probabilities of rows after shared prefixes, in strips or padded batches of at most
        max_tokens tokens and max_rows rows; always eager: compiling would cost more than it saves.
        greedy: as in continuations.py. consumer: makes one of its consumers. Where a batch does not
        fit, all begins anew with half of it, and with another consumer. ValueError where the model
        gives NaN."""
        overhead = batch_overhead(self.model, self.dist.device)
        max_tokens = max_tokens or BATCH_TOKENS[self.dist.device.type]
        end_to_end = strips.apply(self.model, rows, self.dist)
        plan = strips.plan_strips if end_to_end else continuations.plan_batches

        def score(most):
            batches: Sequence[continuations.Portion] = plan(rows, most, max_rows, overhead)
            see = consumer() if consumer else None
            with cli.progress(len(rows.ids), "rows", "row") as bar:
                return batches, continuations.score_continuations(
                    self.model, rows, batches, self.dist, bar, greedy, see
                )

        self._reset_peak()
        start = time.perf_counter()
        (batches, scores), used = halve_until_it_fits(score, max_tokens)
        seconds = time.perf_counter() - start
        if not (np.isfinite(scores.choices).all() and np.isfinite(scores.targets).all()):
            raise ValueError(
                "the model gives NaN or infinite log-probabilities; no score is written"
            )
        flops = None if self.config is None else continuations.unique_flops(self.config, rows)
        unshared = rows.lengths.sum() + sum(len(rows.prefixes[g]) for g in rows.prefix)
        cost = {
            "seconds": seconds,
            "tokens_per_second": rows.unique_tokens() / seconds,
            "rows": len(rows.ids),
            "tokens_padded": sum(batch.tokens for batch in batches),
            "tokens_unshared": int(unshared),
            "batches": len(batches),
        }
        self._note(cost, flops, batch_tokens=used, compiled=False)
        return scores

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling | Sequence[Sampling] | Sequence[Sequence[Sampling]],
        n_samples: int = 1,
        *,
        keys: Sequence[str] | None = None,
        end_ids: Collection[int] | None = None,
        done: Collection[tuple[int, int]] = frozenset(),
        batch_size: int | None = None,
    ) -> Iterator[Sample]:
        """This rank's Samples as they are finished, of n_samples of each prompt but those in
        `done`, {(prompt_index, sample_index)}. keys: what names each prompt in the random streams.
        end_ids: tokens that end a sample, the tokenizer's end of text unless given. The last one
        comes once every rank has drawn its share. ValueError where the model gives NaN."""
        tokenizer, dist, n_tokens = self.facts.tokenizer, self.dist, 0
        self._refuse_nan(prompts)
        self._reset_peak()
        start = time.perf_counter()
        seconds, drawn = 0.0, set(done)
        while True:
            fits = True
            job = engine.generate(
                self.model,
                prompts,
                sampling,
                tokenizer=tokenizer,
                n_samples=n_samples,
                eos_ids=self._end_of_text() if end_ids is None else end_ids,
                keys=keys,
                done=drawn,
                batch_size=batch_size,
                compile=WITH_COMPILE[self.compile],
                kv_dtype=self.cache.kv_dtype,
                dist=dist,
            )
            batch_size = job.batch_size
            try:
                for sample in job:
                    drawn.add((sample.prompt_index, sample.sample_index))
                    n_tokens += len(sample.token_ids)
                    yield sample
            except torch.OutOfMemoryError:
                fits = False
            if dist.pipe is not None:
                fits = dist.pipe.settle() and fits
            seconds = time.perf_counter() - start
            if all(dist.gather(fits)):
                break
            self._empty_cache()
            if batch_size == 1:
                raise ValueError(OUT_OF_MEMORY)
            batch_size //= 2
            print0(f"out of memory: going on with a batch of {batch_size}")
            drawn = set().union(*dist.gather(drawn))  # units are dealt anew
        parts = np.array(dist.gather((seconds, n_tokens)))
        slowest, total = float(parts[:, 0].max()), int(parts[:, 1].sum())
        cost = {"seconds": slowest, "tokens": total, "tokens_per_second": total / slowest}
        self._note(cost, None, batch_size=batch_size, compiled=job.compiled)

    # -- What they cost -----------------------------------------------------------------------

    def cost(self) -> dict:
        """Of the last verb: seconds, counts, ranks, the GPU and the highest peak of its memory on
        any rank, and the model FLOPs utilisation. All ranks ask alike."""
        dist = self.dist
        cost: dict[str, Any] = {"world_size": dist.world_size}
        cost |= {"shard": dist.group_size} if dist.pipe else {}
        cost |= {"gpu": None, "peak_memory_bytes": None, "mfu": None}
        if dist.device.type == "cuda":
            cost["gpu"] = torch.cuda.get_device_name(dist.device)
            peaks = dist.gather(torch.cuda.max_memory_allocated(dist.device))
            cost["peak_memory_bytes"] = max(peaks)
            gpu = gpus.find_gpu(cost["gpu"])
            if gpu is not None and self._flops is not None:
                seconds = self._cost["seconds"]
                cost["mfu"] = gpus.mfu(self._flops, seconds, dist.world_size, gpu)
        return self._cost | cost

    def ran(self) -> dict:
        """How the last verb ran, for a record's protocol, and on which weights."""
        rounded = getattr(self.model, "quantisation", None)
        if rounded:
            return self._ran | {"quantisation": rounded}
        packing = getattr(self.model, "packing", None)
        if packing and self.dist.pipe:  # of this rank's layers: all that hold the model, together
            each = self.dist.gather(packing)[: self.dist.pipe.size]
            packing = {name: sum(part[name] for part in each) for name in packing}
        return self._ran | ({"packing": packing} if packing else {})

    # -- Inside -------------------------------------------------------------------------------

    def should_compile(self, windows: "AnyWindows", batch_size: int) -> bool:
        """Whether torch.compile pays for itself over the scoring of these windows, so many at once,
        and the jobs to come."""
        c, n_tokens = self.config, len(windows) * windows.seq_len
        at_once = min(batch_size, len(windows)) * windows.seq_len
        if self.compile != "auto" or c is None:
            return self.compile == "on" and c is not None
        if _in_few_kernels(self.model) and at_once * block_weights(c) > BUSY:
            return False
        saved = n_tokens * self.n_jobs * c.n_layers * c.d_model * SAVED_SECONDS_PER_UNIT
        return self.dist.device.type == "cuda" and saved > COMPILE_SECONDS

    def _end_of_text(self) -> tuple[int, ...]:
        eos = getattr(self.facts.tokenizer, "eos_token_id", None)
        return () if eos is None else (eos,)

    def _warm_up(self, nll_fn, zeros, mark) -> None:
        """One batch of zeros: compiles, picks kernels, and shows whether memory suffices."""
        with torch.no_grad():
            self.dist.attempt(nll_fn, zeros, zeros, None, *([] if mark is None else [zeros]))
        if zeros.is_cuda:
            torch.cuda.synchronize(zeros.device)

    @torch.no_grad()
    def _refuse_nan(self, prompts) -> None:
        if not prompts:
            return
        shortest = min(prompts, key=len)[: self.facts.context]
        ids = torch.tensor([shortest], device=self.dist.device)
        hidden, finite = self.model.hidden(ids), True
        if hidden is not None:
            finite = bool(self.model.logits(hidden[:, -1]).isfinite().all())
        if not (all(self.dist.gather(finite)) if self.dist.pipe else finite):
            raise ValueError("the model gives NaN or infinite logits; no score is written")

    def _reset_peak(self) -> None:
        if self.dist.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.dist.device)

    def _empty_cache(self) -> None:
        if self.dist.device.type == "cuda":
            torch.cuda.empty_cache()

    def _note(self, cost: dict, flops: float | None, **ran) -> None:
        self._cost, self._flops, self._ran = cost, flops, ran


def batch_overhead(model: Model, device: torch.device) -> int:
    """How many tokens one more batch costs, launches and half-filled kernels, next to padding.

    A block's launches take 0.2 ms or so, in which a GPU at 200 TFLOP/s gets through 2e10 weights.
    """
    if device.type == "cpu" or not model.is_native:
        return 128
    return int(min(max(2e10 / block_weights(model.config), 512), 8192))


def block_weights(config: GPTConfig) -> int:
    """Of the first block, wherever it lies."""
    return count_parameters(part(config, range(1)))["block"]


def _in_few_kernels(model: Model) -> bool:
    """Whether all between two products of an eager block is one kernel already
    (gpu_kernels/elementwise.py), so that compiling saves launches alone: on an H100 it made 124M,
    XL, 7B and Qwen3's 8B 1 to 2% slower."""
    assert model.is_native, "others are never compiled"
    c, rounded = model.config, model.quantisation  # whose activations may be rounded as well
    one = c.activation in ACTIVATIONS if c.gated_mlp else c.activation == "gelu_new" and c.mlp_bias
    norms = not c.pre_norm, c.post_norm, c.parallel_residual, c.qk_norm and not turns_normed(c)
    more = c.n_experts, c.kv_lora_rank, c.clip_qkv, c.attention_softcap, c.residual_scale != 1.0
    return one and model.dtype != torch.float32 and not any((rounded, *norms, *more))


def halve_until_it_fits(score: Callable[[int], T], batch_size: int) -> tuple[T, int]:
    """(score(b), b) for the first b of batch_size, batch_size // 2, … that memory holds.

    Batches of another size may round differently, so the size belongs in the record.
    """
    while True:
        try:
            return score(batch_size), batch_size
        except scoring.BatchTooLarge:
            if batch_size == 1:
                raise ValueError(OUT_OF_MEMORY) from None
            batch_size //= 2
            print0(f"out of memory: going on with a batch of {batch_size}")
