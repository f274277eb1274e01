"""Against a reference, token by token: divergence of every distribution, and the likeliest token.

    reference = open_reference("checkpoints/full", "bfloat16", facts)
    totals, tokens = reference.compare(local, stream, windows, batch_size, results_dir)
    tokens.kl                                   # [scored tokens]: tasks.divergence.Tokens

The reference runs once over the windows, and its final hidden states are kept (states.py). Then a
model's logits are taken together with those that the reference's head makes of its states: both in
float32, products of whatever dtype each has, and the softmax over all of the vocabulary in float64.
Nothing is left out, bounded or rounded further, so a model's divergence from itself is 0.

While the reference runs, both models are in memory; afterwards the reference's head alone. Where
ranks hold a model between them (--shard), so they hold the reference, and the last of each group,
which has the logits, its head.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

import checkpoint
from backends import Facts, parallel
from backends.scoring import WindowTotals
from backends.states import States
from checkpoint import Checkpoint
from cli import printable
from distributed import Dist, print0
from recording.identity import config_hash, run_directory
from recording.sources import ROOT, running_code
from tasks.divergence import Tokens
from tokenizer import Tokenizer
from transformers_model import Model

if TYPE_CHECKING:
    from backends.local import Local
    from dataset import RandomWindows, TokenStream, Windows

FOLDER = ".references"  # of a results directory: no place of records
ELEMENTS = 2**25  # of a table of float64 that is held at once
LOOKED_AT = 2000  # tokens, to tell another tokenizer by


def divergences(
    logits: torch.Tensor, base_logits: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """[N, 4] float64 of logits [N, V] against the reference's, for targets [N]: the divergence
    sum_i p_base(i) (ln p_base(i) - ln p(i)) in nats, nll and the reference's, and whether both have
    the same likeliest token: the first of those, where several are."""
    rows = max(1, ELEMENTS // logits.shape[-1])
    parts = zip(*(x.split(rows) for x in (logits, base_logits, targets)))
    return torch.cat([_divergences(*part) for part in parts])


def _divergences(logits, base_logits, targets):
    log_q, log_base = logits.double().log_softmax(-1), base_logits.double().log_softmax(-1)
    p = log_base.exp()
    terms = torch.where(p > 0, p * (log_base - log_q), 0.0)  # what is impossible adds nothing
    nll, base_nll = (-logs.gather(1, targets[:, None])[:, 0] for logs in (log_q, log_base))
    same = logits.argmax(-1) == base_logits.argmax(-1)
    return torch.stack((terms.sum(-1), nll, base_nll, same.double()), 1)


# ---------------------------------------------------------------------------------------------
# The reference


def open_reference(path: str, dtype: str, facts: Facts) -> "Reference":
    """The reference at `path` for models of these facts. ValueError, one line, where it has not
    their vocabulary."""
    ckpt = checkpoint.open(path)
    if ckpt.vocab_size != facts.vocab_size:
        raise ValueError(
            f"--reference {path} has a vocabulary of {ckpt.vocab_size:,}, {facts.name} one of "
            f"{facts.vocab_size:,}: their probabilities cannot be compared"
        )
    return Reference(ckpt, dtype)


class Reference:
    """What others are compared with: a handle, in a precision of its own. Its head stays in memory
    from one comparison to the next."""

    def __init__(self, ckpt: Checkpoint, dtype: str):
        self.ckpt, self.dtype = ckpt, dtype
        self._head: Model | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        """What of it decides the numbers."""
        return {"fingerprint": self.ckpt.fingerprint, "dtype": self.dtype}

    @property
    def about(self) -> dict[str, Any]:
        """For a record: the same, and what people call it."""
        return self.protocol | {"name": self.ckpt.name, "path": str(self.ckpt.path)}

    def check(
        self,
        stream: "TokenStream",
        window: int,
        tokenizer: Tokenizer | None,
        own_tokenizer: Tokenizer | None,
    ) -> None:
        """ValueError where the windows would be too long for it, and where its own tokenizer makes
        other tokens of the text that is scored: of its beginning, which is looked at."""
        path, context = self.ckpt.path, self.ckpt.context
        if context is not None and window > context:
            raise ValueError(
                f"--reference {path} has {context} positions, too few for windows of {window}: "
                f"--seq-len {context}"
            )
        if tokenizer is None or own_tokenizer is None:
            return
        text = tokenizer.decode(stream.read(0, min(len(stream), LOOKED_AT)).tolist())
        if own_tokenizer.encode(text) != tokenizer.encode(text):
            raise ValueError(
                f"--reference {path} has another tokenizer: the same tokens are other texts to it"
            )

    def compare(
        self,
        backend: "Local",
        stream: "TokenStream",
        windows: "Windows | RandomWindows",
        batch_size: int,
        results_dir: Path | None,
    ) -> tuple[WindowTotals, Tokens]:
        """What backend.score_windows gives, and an entry for each scored token. results_dir: where
        the states are kept for the next model; without one they go when this call ends. Every rank
        calls it alike and gets the same bits, on any number of them."""
        dist, T = backend.dist, windows.seq_len
        found = torch.zeros(len(windows) * T, 5, dtype=torch.float64, device=dist.device)
        with _root(results_dir, dist) as root:
            key = self._key(backend, stream, windows, batch_size)
            name = f"{self.ckpt.name}-{self.ckpt.fingerprint[:8]}-{key[:16]}"
            states = States(run_directory(root / FOLDER, name), windows, dist)
            head = self._run(states, backend, stream, batch_size)

            def see(logits, targets, places):
                assert head is not None, "where there are logits"
                base = head.logits(states.rows(places), exact=True)
                found[places, :4] = divergences(logits, base, targets)
                found[places, 4] = 1.0

            def anew():
                found.zero_()
                return see

            totals = backend.score_windows(stream, windows, batch_size, consumer=anew)
        every = dist.sum(found)
        scored = np.flatnonzero(every[:, 4])
        kl, nll, base_nll, same_top, _ = every[scored].T
        if not np.isfinite(base_nll).all():  # of states that were kept before that was seen
            raise ValueError(
                f"--reference {self.ckpt.path}: the model gives NaN or infinite losses"
            )
        return totals, Tokens(kl, nll, base_nll, same_top == 1, scored // T)

    def _key(self, backend, stream, windows, batch_size) -> str:
        """Of all that the states depend on."""
        of_windows = {name: np.asarray(v).tolist() for name, v in vars(windows).items()}
        return config_hash(
            {
                "reference": [self.protocol, self.ckpt.config and self.ckpt.config.to_dict()],
                "tokens": [stream.fingerprint, stream.bos_id if of_windows.get("bos") else None],
                "windows": [type(windows).__name__, of_windows],
                "batches": [batch_size, backend.should_compile(windows, batch_size)],
                "device": _device_name(backend.dist),
                "code": running_code(__file__, self.ckpt.rooms, ROOT),
            }
        )

    def _run(self, states: States, backend: "Local", stream, batch_size: int) -> Model | None:
        """The head, once all states are there; None where another rank of a group has it."""
        dist, part = backend.dist, states.missing(batch_size)
        has_head = dist.pipe is None or dist.pipe.is_last
        if part is not None:
            print0(f"{printable(self.ckpt.path)}: the reference's states of {len(part):,} windows")
            model = self._made(lambda: parallel.load(self.ckpt, self.dtype, dist))
            # as the model that is compared, or rounding alone would set them apart
            compile = "on" if backend.should_compile(states.windows, batch_size) else "off"
            facts = replace(backend.facts, name=self.ckpt.name, dtype=self.dtype)
            # of the same kind, which is not imported: the code of the one that runs counts anyway
            local = type(backend)(model, facts=facts, dist=dist, compile=compile)
            dtype = _rounded_to(model)

            def keep(hidden, targets, ids):
                states.keep(hidden.to(dtype or hidden.dtype), targets, ids)

            states.open(part)
            try:
                some = cast("Windows", part)  # it has all that is asked of windows
                local.score_windows(stream, some, batch_size, keep_states=keep)
            except ValueError as error:
                raise ValueError(f"--reference {self.ckpt.path}: {error}") from None
            finally:
                states.close()
            if states.missing(batch_size) is not None:
                raise ValueError(
                    f"{states.folder}: what one rank writes there another does not see: "
                    "--results-dir must be a folder that all of them share"
                )
            self._head = _head_of(model) if has_head else None
        elif self._head is None and has_head:
            self._head = self._made(lambda: self._load_head(dist.device))
        return self._head

    def _load_head(self, device: torch.device) -> Model:
        if self.ckpt.native:
            return self.ckpt.load(self.dtype, device, parallel.head_alone)
        return _head_of(self.ckpt.load(self.dtype, "cpu")).to(device)

    def _made(self, load: Callable[[], Model]) -> Model:
        try:
            return load()
        except torch.OutOfMemoryError:
            raise ValueError(
                f"--reference {self.ckpt.path}: no memory for it beside the model: --device cpu, "
                "a smaller --reference-dtype, or --shard"
            ) from None
        except ValueError as error:  # of a model that --shard does not cut, say
            if str(self.ckpt.path) in str(error):
                raise
            raise ValueError(f"--reference {self.ckpt.path}: {error}") from None


def _rounded_to(model: Model) -> torch.dtype | None:
    """What the head rounds its states to before anything else, which so loses nothing; None where
    it does something else first, or is not ours."""
    return model.dtype if model.is_native and model.config.logit_scale == 1.0 else None


def _head_of(model: Model) -> Model:
    """What `logits` needs of a model; the rest gives its memory back."""
    if model.is_native:
        _leave_alone(model, model.lm_head)
        return model
    causal_lm = model.causal_lm
    head = causal_lm.get_output_embeddings()
    if _leave_alone(causal_lm, head):
        # transformers' own looks at the other modules first
        causal_lm.get_output_embeddings = lambda: head  # type: ignore[method-assign]
    return model


def _leave_alone(owner: torch.nn.Module, head: torch.nn.Module) -> bool:
    """Whether the head lies in a module where all else could be dropped, which it is then."""
    children = dict(owner.named_children())
    found = any(child is head for child in children.values())
    for name, child in children.items():
        if found and child is not head:
            delattr(owner, name)
    return found


@contextlib.contextmanager
def _root(results_dir: Path | None, dist: Dist) -> Iterator[Path]:
    """The results directory, or one that all ranks of a machine share until they are done."""
    if results_dir is not None:
        yield results_dir
        return
    with contextlib.ExitStack() as stack:
        own = tempfile.TemporaryDirectory() if dist.is_main else contextlib.nullcontext()
        yield Path(dist.broadcast(stack.enter_context(own)))
        dist.barrier()


def _device_name(dist: Dist) -> str:
    is_cuda = dist.device.type == "cuda"
    return torch.cuda.get_device_name(dist.device) if is_cuda else dist.device.type
