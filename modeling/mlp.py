"""What a block adds token by token: an MLP, or a mixture of experts, of which a router chooses a
few for each token.

    MLP(config, width)(x)        # x [..., C] -> [..., C]
    Mixture(config)(x)           # the same; gpu_kernels/experts.py has the experts' products

The experts of a layer are stacked in front, [E, out, in], however a file lays them out. What they
make of a token is weighed and added in float32 in the order of the router's choice, so that a token
has the same sum whatever its neighbours are.

Source: Shazeer et al. 2017; losses that balance the load: Fedus et al. 2021; groups and choices by
a bias: DeepSeek-V2 and V3.

Shapes: N tokens, C d_model, E experts, K of them a token
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPTConfig
from gpu_kernels.elementwise import activate
from gpu_kernels.experts import through_experts


class Linear(nn.Linear):
    """nn.Linear that takes its input in any dtype: the weight's dtype decides."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its product, outside autocast."""
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):  # which casts x itself, without a detour
            x = x.to(self.weight.dtype)
        return F.linear(x, self.weight, self.bias)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.config = config
        rows = 2 * width if config.gated_mlp else width  # [gate; up]
        self.fc1 = Linear(config.d_model, rows, bias=config.mlp_bias)
        self.fc2 = Linear(width, config.d_model, bias=config.mlp_bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of its products, outside autocast."""
        return self.fc1.dtype

    def forward(self, x: Tensor) -> Tensor:
        c, fc1 = self.config, self.fc1
        fused = c.activation == "gelu_new" and c.mlp_bias and not c.gated_mlp
        fused = fused and type(fc1) is Linear and not x.requires_grad
        fused = fused and not fc1._forward_pre_hooks  # which want to see x
        if fused and x.is_cuda and _is_half(fc1.weight):
            # cuBLAS applies bias and tanh GELU before it writes the product: one pass less
            rows = x.to(fc1.weight.dtype).flatten(0, -2)
            h = torch._addmm_activation(fc1.bias, rows, fc1.weight.t(), use_gelu=True)
            return self.fc2(h.view(*x.shape[:-1], -1))
        return self.fc2(activate(fc1(x), c.activation, c.gated_mlp))


def _is_half(weight) -> bool:
    """True once the weights were cast for inference: what is trained stays in float32."""
    return weight.dtype != torch.float32 and not weight.requires_grad


# ---------------------------------------------------------------------------------------------
# Mixtures of experts


class Router(nn.Module):
    """Which experts a token goes through, and how much each of them counts."""

    bias: nn.Parameter | None
    choice_bias: nn.Parameter | None

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, E = config, config.n_experts
        self.weight = nn.Parameter(torch.empty(E, config.d_model))
        nn.init.normal_(self.weight, std=0.02)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(E)) if config.router_bias else None
        )
        # what balances the load without a loss moves it, no gradient does
        fixed = nn.Parameter(torch.zeros(E), requires_grad=False)
        self.register_parameter("choice_bias", fixed if config.router_choice_bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weights [N, K], chosen [N, K] int64, logits [N, E]) of x [N, C], all in float32."""
        c, logits = self.config, self._logits(x)
        scores = logits.softmax(-1) if c.router_score == "softmax" else logits.sigmoid()
        choice = scores if self.choice_bias is None else scores + self.choice_bias
        if c.n_expert_groups > 1:
            choice = self._in_best_groups(choice)
        chosen = choice.topk(c.n_experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if c.router_norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.router_scale, chosen, logits

    def _logits(self, x: Tensor) -> Tensor:
        """A rounded logit could choose another expert: float32, whatever the products are in. Those
        of numbers of 16 bits are exact, and tensor cores add them up in float32."""
        halves = x.dtype == self.weight.dtype != torch.float32
        if x.is_cuda and halves and not torch.is_grad_enabled():
            logits = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
            return logits if self.bias is None else logits + self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)

    def _in_best_groups(self, choice: Tensor) -> Tensor:
        """choice [N, E] where a token's best groups of experts are, elsewhere minus infinity."""
        c = self.config
        grouped = choice.unflatten(-1, (c.n_expert_groups, -1))
        best = grouped.topk(2 if c.expert_group_score == "top2" else 1, dim=-1).values.sum(-1)
        kept = best.topk(c.n_expert_groups_per_token, dim=-1).indices
        others = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        return grouped.masked_fill(others[..., None], float("-inf")).flatten(-2)


class Stack(nn.Module):
    """One matrix [out, in] for each expert, as one parameter [E, out, in]."""

    def __init__(self, n_experts: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))
        nn.init.normal_(self.weight, std=0.02)


class Experts(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, E, width = config, config.n_experts, config.d_ff_expert
        self.fc1 = Stack(E, config.d_model, 2 * width if config.gated_mlp else width)  # [gate; up]
        self.fc2 = Stack(E, width, config.d_model)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """[N, C] float32 of x [N, C], weights and chosen [N, K]."""
        c, up, down = self.config, self.fc1.weight, self.fc2.weight
        dtype = up.dtype
        if torch.is_autocast_enabled(x.device.type):  # which does not know grouped products
            dtype = torch.get_autocast_dtype(x.device.type)
        operands = x.to(dtype), up.to(dtype), down.to(dtype)
        y, place = through_experts(*operands, chosen, c.activation, c.gated_mlp)
        out = weights[:, :1] * y[place[:, 0]].float()
        for k in range(1, c.n_experts_per_token):
            out = out + weights[:, k, None] * y[place[:, k]].float()
        return out


class Mixture(nn.Module):
    """A router and its experts, with or without an expert that every token passes."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.router, self.experts = Router(config), Experts(config)
        if config.d_ff_shared:
            self.shared = MLP(config, config.d_ff_shared)
        if config.shared_gate:
            self.shared_gate = Linear(config.d_model, 1, bias=False)
        self.load: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of its products, outside autocast."""
        return self.experts.fc1.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if not torch.is_autocast_enabled(x.device.type):
            rows = rows.to(self.dtype)
        weights, chosen, logits = self.router(rows)
        y = self.experts(rows, weights, chosen)
        if self.training and self.config.router_loss:
            self.load = load_of(logits, chosen)
        if self.config.d_ff_shared:
            shared = self.shared(rows)
            if self.config.shared_gate:
                shared = shared * self.shared_gate(rows).sigmoid()
            y = y + shared
        return y.view(x.shape)


def load_of(logits: Tensor, chosen: Tensor) -> Tensor:
    """[2, E] of logits [N, E] and chosen [N, K]: the share of tokens that chose each expert, and
    the mean probability that the router gave it."""
    every = torch.arange(logits.shape[1], device=logits.device)
    share = (chosen[..., None] == every).sum(1).float().mean(0)
    return torch.stack((share, logits.softmax(-1).mean(0)))


def balance_loss(loads: Tensor) -> Tensor:
    """The load-balancing loss of loads [L, 2, E], a scalar: the number of experts chosen where all
    of them are chosen as often, more where some are chosen more. As transformers has it, over all
    layers at once."""
    share, probability = loads.mean(0)
    return loads.shape[-1] * (share * probability).sum()
