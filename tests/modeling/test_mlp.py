"""Routers and the loss that balances them, against transformers' own."""

import pytest
import torch
import transformers
from family_checks import EAGER, IDS, SIZES
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import checkpoint
from config import GPTConfig
from model import GPTModel
from modeling.mlp import Mixture, balance_loss, load_of

FIELDS = dict(vocab_size=23, max_position_embeddings=32, n_layers=3, n_heads=2, d_model=16, d_ff=12)
FIELDS |= dict(norm="rmsnorm", position="rope", gated_mlp=True, bias=False, dropout=0.0)
FIELDS |= dict(n_experts=6, n_experts_per_token=2, router_loss=0.5)


@pytest.mark.parametrize("K", [1, 3, 6])
def test_the_loss_of_routers_is_transformers(K):
    g = torch.Generator().manual_seed(K)
    logits = [torch.randn(40, 6, generator=g, requires_grad=True) for _ in range(4)]
    wanted = load_balancing_loss_func(tuple(logits), 6, K)
    loads = [load_of(x, x.topk(K).indices) for x in logits]
    found = balance_loss(torch.stack(loads))
    assert abs(found - wanted) <= 1e-6
    gradients = [torch.autograd.grad(loss, logits) for loss in (wanted, found)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
    even = torch.full((2, 2, 8), 1 / 8)
    even[:, 0] *= K
    assert balance_loss(even).item() == pytest.approx(K)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_training_step_has_the_gradients_of_transformers(name, recomputed, tmp_path):
    """Of the loss with the routers' loss added, across all layers."""
    experts = dict(num_experts_per_tok=2, router_aux_loss_coef=0.7, output_router_logits=True)
    experts |= {"num_local_experts" if name == "mixtral" else "num_experts": 5}
    sizes = SIZES | dict(num_hidden_layers=3)
    config = transformers.AutoConfig.for_model(name, **(sizes | experts))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    ours = GPTModel(checkpoint.open(tmp_path).config)
    checkpoint.load_weights(tmp_path, ours)
    assert ours.config.router_loss == 0.7
    out = theirs(IDS, labels=IDS)
    out.loss.backward()
    ours.train().activation_checkpointing = recomputed
    _, loss = ours(IDS, labels=IDS)
    balance = balance_loss(ours.router_loads())
    assert abs(balance - out.aux_loss) <= 1e-6
    (loss + 0.7 * balance).backward()
    pairs = [
        (theirs.model.embed_tokens.weight, ours.token_embedding.weight),
        (theirs.model.layers[1].mlp.gate.weight, ours.blocks[1].mlp.router.weight),
        (theirs.model.layers[0].mlp.experts.gate_up_proj, ours.blocks[0].mlp.experts.fc1.weight),
        (theirs.model.layers[2].mlp.experts.down_proj, ours.blocks[2].mlp.experts.fc2.weight),
    ]
    for p, q in pairs:
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max()


def test_loads_are_kept_in_training_alone():
    model = GPTModel(GPTConfig(**FIELDS, dense_layers=(1,)))
    ids = IDS % 23
    with torch.no_grad():
        model.eval()(ids[:, :16])
    mixtures = [block.mlp for block in model.blocks if isinstance(block.mlp, Mixture)]
    assert len(mixtures) == 2 and all(mlp.load is None for mlp in mixtures)
    model.train()(ids[:, :16])
    loads = model.router_loads()
    assert loads.shape == (2, 2, 6)
    assert torch.allclose(loads.sum(-1), torch.tensor([2.0, 1.0]), atol=1e-5)


@torch.no_grad()
def test_what_decides_stays_in_float32():
    """Weights in 16 bits; logits are not rounded, and the bias of a choice is not either."""
    model = GPTModel(GPTConfig(**FIELDS, router_choice_bias=True)).for_inference(torch.bfloat16)
    router = model.blocks[0].mlp.router
    assert (router.weight.dtype, router.choice_bias.dtype) == (torch.bfloat16, torch.float32)
    x = torch.randn(9, 16).bfloat16()
    weights, _, logits = router(x)
    assert weights.dtype == logits.dtype == torch.float32
    exact = x.double() @ router.weight.double().T
    assert (logits - exact).abs().max() < 1e-6
