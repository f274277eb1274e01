"""LayerNorm and RMSNorm in float32, of the residual stream, of queries and keys, of latents; and
the residual stream, whose sums they take over where one kernel does both."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig
from gpu_kernels import elementwise

LATENT_EPS = 1e-6  # of the norms within latent attention, whatever norm_eps says


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in float32, of x [..., width]. With weight w:
    times w, or 1 + w. heads: x [..., heads, width], with a weight of its own for each head."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, config: GPTConfig, width: int, kind: str, bias: bool, heads: int = 1):
        super().__init__()
        self.layer_norm, self.eps, self.offset = kind == "layernorm", config.norm_eps, 0.0
        self.width, self.heads = width, heads
        if config.norm_weight:
            self.offset = 1.0 if config.norm_offset else 0.0
            self.weight = nn.Parameter(torch.full((heads * width,), 1.0 - self.offset))
        else:
            self.register_parameter("weight", None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """float32; or in `dtype`, that of the products it goes into, where one kernel does both."""
        if self._in_one_kernel(x, dtype or x.dtype):
            return elementwise.norm(x, self._terms, dtype or torch.float32)
        x, shape = x.float(), (self.width,)
        # in 16 bits where training gathers all of a block so (training/fsdp.py)
        weight: Tensor | None = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if weight is not None and self.offset:
            weight = weight + self.offset
        own = None if self.heads == 1 or weight is None else weight.view(self.heads, self.width)
        shared = weight if own is None else None
        if self.layer_norm:
            x = F.layer_norm(x, shape, shared, bias, self.eps)
        else:
            x = F.rms_norm(x, shape, shared, self.eps)
        return x if own is None else x * own

    def after(
        self, x: Tensor, branch: Tensor, dtype: torch.dtype, of_branch: "Norm | None" = None
    ) -> tuple[Tensor, Tensor]:
        """(x + branch, its norm in `dtype`) of the residual stream x and what is added to it, after
        a norm of its own where there is one."""
        if x.dtype == torch.float32 and self._in_one_kernel(x, dtype):
            first = None if of_branch is None else of_branch._terms
            return elementwise.add_and_norm(x, branch, self._terms, dtype, first)
        x = plus(x, branch, of_branch)
        return x, self(x, dtype)

    def _in_one_kernel(self, x: Tensor, dtype: torch.dtype) -> bool:
        fits = self.heads == 1 and self.width <= elementwise.MAX_WIDTH
        return fits and elementwise.applies(x, dtype)

    @property
    def _terms(self) -> elementwise.Terms:
        return elementwise.Terms(self.weight, self.bias, self.eps, not self.layer_norm, self.offset)


def plus(x: Tensor, branch: Tensor, of_branch: Norm | None) -> Tensor:
    """The residual stream x [..., C] and what is added to it, after its norm if it has one."""
    if of_branch is None:
        return x + branch
    if x.dtype == torch.float32 and of_branch._in_one_kernel(branch, branch.dtype):
        return elementwise.add_and_norm(x, branch, None, x.dtype, of_branch._terms)[0]
    return x + of_branch(branch)


class Stream:
    """The residual stream [..., C], float32. What a branch adds waits for the norm that follows, of
    this block or of the next: where one kernel adds and norms, the sum costs no pass of its own."""

    def __init__(self, x: Tensor):
        self._x: Tensor = x
        self._branch: Tensor | None = None
        self._of_branch: Norm | None = None

    def add(self, branch: Tensor, norm: nn.Module | None = None) -> None:
        """[..., C], to be added; where there is a norm, of stream_norm, after it."""
        self.whole()
        self._branch, self._of_branch = branch, norm if isinstance(norm, Norm) else None

    def normed(self, norm: nn.Module, dtype: torch.dtype) -> Tensor:
        """What a branch begins with: the norm of the stream, of stream_norm, for products in
        `dtype`; the stream itself where there is none."""
        if self._branch is None or not isinstance(norm, Norm):
            x = self.whole()
            return norm(x, dtype) if isinstance(norm, Norm) else norm(x)
        self._x, h = norm.after(self._x, self._branch, dtype, self._of_branch)
        self._branch = None
        return h

    def whole(self) -> Tensor:
        """The stream, to which nothing is left to be added."""
        if self._branch is not None:
            self._x, self._branch = plus(self._x, self._branch, self._of_branch), None
        return self._x


def stream_norm(config: GPTConfig, wanted: bool = True) -> nn.Module:
    """A norm [..., C] of the residual stream or of what is added to it; nothing if not wanted."""
    if not wanted:
        return nn.Identity()
    return Norm(config, config.d_model, config.norm, config.norm_bias)


def head_norm(config: GPTConfig, heads: int) -> Norm:
    """A norm of queries or keys [..., heads, D]; over the width of all heads [..., heads * D]."""
    kind, over = config.qk_norm_type, config.qk_norm_over
    width = config.head_dim * (heads if over == "width" else 1)
    return Norm(config, width, kind, bias=False, heads=heads if over == "heads" else 1)


def latent_norm(config: GPTConfig, width: int) -> Norm:
    """A norm of what latent attention compresses [..., width]."""
    norm = Norm(config, width, "rmsnorm", bias=False)
    norm.eps = LATENT_EPS
    return norm
