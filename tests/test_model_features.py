"""model.py on random combinations of features, against a plain model written here for them."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.kvcache import DecodeCache, PrefixCache
from config import GPTConfig
from model import GPTModel

V, T, CONTEXT = 23, 14, 32
IDS = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------
# The plain model: float64, position by position, no tensor of more than one token's heads


class Plain:
    def __init__(self, c: GPTConfig, weights: dict[str, torch.Tensor]):
        self.c, self.w = c, {name: w.double() for name, w in weights.items()}

    def norm(self, x, name, kind, heads=1):
        """x [width], or [heads, width] with weights of each head."""
        w, eps = self.w.get(f"{name}.weight"), self.c.norm_eps
        if kind == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        if w is not None:
            w = w + 1 if self.c.norm_offset else w
            x = x * (w.view(heads, -1) if heads > 1 else w)
        bias = self.w.get(f"{name}.bias")
        return x if bias is None else x + bias

    def stream(self, x, name, wanted=True):
        return self.norm(x, name, self.c.norm) if wanted else x

    def linear(self, x, name):
        y, bias = self.w[f"{name}.weight"] @ x, self.w.get(f"{name}.bias")
        return y if bias is None else y + bias

    def act(self, x):
        name = self.c.activation
        if name == "silu":
            return x / (1 + (-x).exp())
        if name == "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        if name == "gelu_new":
            return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        return x.clamp(min=0) ** (2 if name == "relu2" else 1)

    def turn(self, x, layer, position):
        """x [heads, D]: pairs (i, i + R/2) of the first R channels, one by one."""
        c, out = self.c, x.clone()
        windowed = c.sliding_window is not None and layer not in c.full_attention_layers
        theta, slower = c.rope_theta, 1.0
        if windowed and c.local_rope_theta is not None:
            theta = c.local_rope_theta
        elif c.rope_scaling is not None:
            slower = c.rope_scaling["factor"]
        R = c.qk_rope_head_dim or int(c.head_dim * c.rotary_fraction)
        if c.position != "rope" or layer in c.no_rope_layers:
            return x
        for i in range(R // 2):
            angle = position / slower * theta ** (-2 * i / R)
            a, b = x[:, i], x[:, i + R // 2]
            out[:, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i + R // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def normed(self, x, which, layer):
        name, kind = f"blocks.{layer}.attn.{which}_norm", self.c.qk_norm_type
        if self.c.qk_norm_over == "width":
            return self.norm(x.flatten(), name, kind).view_as(x)
        if self.c.qk_norm_over == "heads" and len(x) > 1:
            return self.norm(x, name, kind, len(x))
        return torch.stack([self.norm(head, name, kind) for head in x])

    def query_key_value(self, x, layer, position):
        c, D = self.c, self.c.head_dim
        fused = self.linear(x, f"blocks.{layer}.attn.qkv_proj")
        if c.clip_qkv is not None:
            fused = fused.clamp(-c.clip_qkv, c.clip_qkv)
        heads = fused.view(-1, D)
        q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads])
        for after in (False, True):
            if c.qk_norm and c.qk_norm_after_rope == after:
                q, k = self.normed(q, "q", layer), self.normed(k, "k", layer)
            if not after:
                q, k = self.turn(q, layer, position), self.turn(k, layer, position)
        return q, k, v

    def from_latents(self, x, layer, position):
        """Queries and keys of each head [rope; nope], and values, of what is compressed of x."""
        c, attn = self.c, f"blocks.{layer}.attn"

        def down(which):
            return self.linear(x, f"{attn}.{which}_down_proj")

        def normed(low, which):
            low = low / (low.pow(2).mean() + 1e-6).sqrt()
            w = self.w.get(f"{attn}.{which}_down_norm.weight")
            return low if w is None else low * (w + 1 if c.norm_offset else w)

        if c.q_lora_rank is None:
            q = self.linear(x, f"{attn}.q_proj")
        else:
            q = self.linear(normed(down("q"), "q"), f"{attn}.q_up_proj")
        turned, low = down("kv").split([c.qk_rope_head_dim, c.kv_lora_rank])
        made = self.linear(normed(low, "kv"), f"{attn}.kv_up_proj").view(c.n_heads, -1)
        q = self.turn(q.view(c.n_heads, -1), layer, position)
        k = [torch.cat((turned, head[: c.qk_nope_head_dim])) for head in made]
        return q, self.turn(torch.stack(k), layer, position), made[:, c.qk_nope_head_dim :]

    def attention(self, xs, layer):
        c, out = self.c, []
        make = self.query_key_value if c.kv_lora_rank is None else self.from_latents
        made = [make(x, layer, t) for t, x in enumerate(xs)]
        window = len(xs) if layer in c.full_attention_layers else c.sliding_window or len(xs)
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        for t in range(len(xs)):
            seen = range(max(0, t - window + 1), t + 1)
            heads = []
            for h in range(c.n_heads):
                g = h * c.n_kv_heads // c.n_heads
                scores = torch.stack([made[t][0][h] @ made[s][1][g] * scale for s in seen])
                if c.attention_softcap is not None:
                    scores = c.attention_softcap * torch.tanh(scores / c.attention_softcap)
                heads.append(scores.softmax(0) @ torch.stack([made[s][2][g] for s in seen]))
            out.append(self.linear(torch.cat(heads), f"blocks.{layer}.attn.out_proj"))
        return out

    def mlp(self, x, name, expert=None):
        """expert: which of the matrices that are stacked."""
        fc1, fc2 = (self.w[f"{name}.{fc}.weight"] for fc in ("fc1", "fc2"))
        if expert is not None:
            return fc2[expert] @ self.act_of(fc1[expert] @ x)
        return self.linear(self.act_of(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def act_of(self, h):
        if not self.c.gated_mlp:
            return self.act(h)
        gate, up = h.chunk(2)
        return self.act(gate) * up

    def mixture(self, x, name):
        """Experts one by one, chosen by sorting."""
        c, E = self.c, self.c.n_experts
        logits = self.linear(x, f"{name}.router")
        scores = logits.sigmoid() if c.router_score == "sigmoid" else logits.softmax(0)
        choice = scores + self.w.get(f"{name}.router.choice_bias", 0)
        size = E // c.n_expert_groups
        best = 2 if c.expert_group_score == "top2" and c.n_expert_groups > 1 else 1
        of_groups = [
            sum(sorted(choice[g * size : (g + 1) * size].tolist())[-best:])
            for g in range(c.n_expert_groups)
        ]
        kept = sorted(range(c.n_expert_groups), key=lambda g: -of_groups[g])
        kept = kept[: c.n_expert_groups_per_token]
        chosen = sorted((e for e in range(E) if e // size in kept), key=lambda e: -choice[e])
        chosen = chosen[: c.n_experts_per_token]
        total = sum(scores[e] for e in chosen) if c.router_norm else 1
        y = sum(
            scores[e] / total * c.router_scale * self.mlp(x, f"{name}.experts", e) for e in chosen
        )
        if c.d_ff_shared:
            gate = self.linear(x, f"{name}.shared_gate").sigmoid() if c.shared_gate else 1
            y = y + gate * self.mlp(x, f"{name}.shared")
        return y

    def branch(self, x, layer):
        name = f"blocks.{layer}.mlp"
        dense = self.c.n_experts == 0 or layer in self.c.dense_layers
        return self.mlp(x, name) if dense else self.mixture(x, name)

    def logits(self, ids):
        c = self.c
        xs = [self.w["token_embedding.weight"][i] * c.embedding_scale for i in ids]
        if c.position == "learned":
            xs = [x + self.w["position_embedding.weight"][t] for t, x in enumerate(xs)]
        xs = [self.stream(x, "ln_embedding", c.embedding_norm) for x in xs]
        for layer in range(c.n_layers):
            name = f"blocks.{layer}"
            read = [self.stream(x, f"{name}.ln1", c.pre_norm) for x in xs]
            added = self.attention(read, layer)
            added = [self.stream(y, f"{name}.ln1_post", c.post_norm) for y in added]
            after = [x + c.residual_scale * y for x, y in zip(xs, added)]
            if not c.shared_norm:
                source = xs if c.parallel_residual else after
                read = [self.stream(x, f"{name}.ln2", c.pre_norm) for x in source]
            ys = [self.stream(self.branch(x, layer), f"{name}.ln2_post", c.post_norm) for x in read]
            xs = [x + c.residual_scale * y for x, y in zip(after, ys)]
        hidden = torch.stack([self.stream(x, "ln_f") for x in xs])
        logits = hidden @ self.w["lm_head.weight"].T * c.logit_scale
        if c.head_bias:
            logits = logits + self.w["lm_head.bias"]
        return (
            logits
            if c.logit_softcap is None
            else c.logit_softcap * torch.tanh(logits / c.logit_softcap)
        )


# ---------------------------------------------------------------------------------------------
# Random features


@st.composite
def mixtures(draw):
    """Fields of a mixture of experts, two times of three."""
    if draw(st.sampled_from([True, False, False])):
        return dict(mlp_bias=draw(st.booleans()))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    kept = draw(st.integers(1, groups))
    shared = draw(st.sampled_from([0, 7]))
    return dict(
        n_experts=groups * size,
        n_experts_per_token=draw(st.integers(1, kept * size)),
        d_ff_expert=draw(st.integers(3, 9)),
        dense_layers=tuple(draw(st.lists(st.integers(0, 2), max_size=1))),
        router_score=draw(st.sampled_from(["softmax", "sigmoid"])),
        router_norm=draw(st.booleans()),
        router_scale=draw(st.sampled_from([1.0, 2.5])),
        router_bias=draw(st.booleans()),
        router_choice_bias=draw(st.booleans()),
        n_expert_groups=groups,
        n_expert_groups_per_token=kept,
        expert_group_score=draw(st.sampled_from(["max", "top2"])),
        d_ff_shared=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
        mlp_bias=False,
    )


@st.composite
def configs(draw):
    yes = st.booleans()

    def maybe(value, other=None):
        return value if draw(yes) else other

    groups, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    parallel, pre, norm = draw(yes), draw(yes), draw(st.sampled_from(["layernorm", "rmsnorm"]))
    weighted = draw(st.sampled_from([True, True, False]))
    layers = st.lists(st.integers(0, 2), max_size=2)
    rope = draw(st.sampled_from([True, True, False]))
    latent = {}
    if draw(yes):
        latent = dict(head_dim=None, n_kv_heads=groups * per_group, rotary_fraction=1.0)
        latent |= dict(qk_norm=False, clip_qkv=None, kv_lora_rank=draw(st.integers(3, 9)))
        latent |= dict(q_lora_rank=maybe(7), qk_nope_head_dim=draw(st.integers(1, 6)))
        latent |= dict(qk_rope_head_dim=draw(st.sampled_from([2, 4])), v_head_dim=maybe(5, 11))
    plain = dict(
        vocab_size=V,
        max_position_embeddings=CONTEXT,
        n_layers=3,
        n_heads=groups * per_group,
        n_kv_heads=groups,
        head_dim=8,
        d_model=draw(st.sampled_from([12, 16])),
        d_ff=draw(st.integers(5, 20)),
        dropout=0.0,
        activation=draw(st.sampled_from(["gelu", "gelu_new", "silu", "relu", "relu2"])),
        norm=norm,
        norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        norm_weight=weighted,
        norm_bias=weighted and norm == "layernorm" and draw(yes),
        norm_offset=weighted and draw(yes),
        pre_norm=pre,
        post_norm=draw(yes) or not pre,  # without either the stream outgrows float32
        parallel_residual=parallel,
        shared_norm=parallel and pre and draw(yes),
        embedding_norm=draw(yes),
        position="rope" if rope else "learned",
        rope_theta=draw(st.sampled_from([100.0, 1e4])),
        rope_scaling=maybe({"rope_type": "linear", "factor": 4.0}),
        local_rope_theta=maybe(30.0),
        rotary_fraction=draw(st.sampled_from([1.0, 0.75, 0.25])),
        no_rope_layers=tuple(draw(layers)),
        gated_mlp=draw(yes),
        bias=draw(yes),
        qkv_bias=draw(yes),
        o_bias=draw(yes),
        **draw(mixtures()),
        head_bias=draw(yes),
        qk_norm=draw(yes),
        qk_norm_type=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        qk_norm_over=draw(st.sampled_from(["head", "heads", "width"])),
        qk_norm_after_rope=draw(yes),
        clip_qkv=maybe(0.7),
        attention_scale=maybe(0.6),
        attention_softcap=maybe(1.5),
        logit_softcap=maybe(2.5),
        embedding_scale=maybe(3.0, 1.0),
        residual_scale=maybe(0.3, 1.0),
        logit_scale=maybe(1.7, 1.0),
        tie_embeddings=draw(yes),
        sliding_window=draw(st.sampled_from([None, 3, 6])),
        full_attention_layers=tuple(draw(layers)),
    )
    return GPTConfig(**plain | latent)


def model_of(c: GPTConfig) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(c).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs())
@torch.no_grad()
def test_logits_of_random_features(c):
    model = model_of(c)
    plain = Plain(c, model.state_dict())
    wanted = torch.stack([plain.logits(ids) for ids in IDS]).float()
    bound = 5e-5 * max(1.0, wanted.abs().max().item())

    def same(got, want):
        assert (got - want).abs().max() <= bound

    same(model(IDS)[0], wanted)
    same(model.logits(model.hidden(IDS)), wanted)
    nats = model.nll(model.hidden(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    picked = wanted[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None]).flatten()
    assert (nats + picked).abs().max() <= 4 * bound
    # left padding: a row's tokens see nothing of what stands before them
    real = torch.ones_like(IDS)
    real[1, :4] = 0
    if c.position == "rope" and not (c.qk_norm and c.qk_norm_after_rope):  # distances alone matter
        alone = plain.logits(IDS[1, 4:]).float()
        same(model(IDS, attention_mask=real)[0][1, 4:], alone)
    decode = DecodeCache(model, n_prompts=2, prompt_len=8, n_rows=2, max_len=6)
    same(
        model.logits(model.hidden(IDS[:, :8], cache=decode.filling([0, 1], [8, 8]))), wanted[:, :8]
    )
    decode.assign([0, 1])
    for t in range(8, T):
        same(model.logits(model.hidden(IDS[:, t : t + 1], cache=decode))[:, 0], wanted[:, t])
        decode.advance(torch.ones(2, dtype=torch.int32))
    prefix = PrefixCache(model, 5)
    model.hidden(IDS[:1, :5], cache=prefix.filling())
    same(model.logits(model.hidden(IDS[:1, 5:], cache=prefix)), wanted[:1, 5:])


@settings(max_examples=15, deadline=None)
@given(configs())
def test_random_features_train(c):
    """Every parameter has a gradient, the same with recomputation; saved configs come back."""
    model = model_of(c).train()
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        hidden = model.hidden(IDS)[:, :-1].flatten(0, 1)
        model.nll(hidden, IDS[:, 1:].flatten()).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    unused = {n for n, g in gradients[0].items() if g is None and "choice_bias" not in n}
    assert not unused, unused
    for name, g in gradients[0].items():
        if name.endswith("choice_bias"):
            assert g is None
            continue
        assert g.isfinite().all() and torch.equal(g, gradients[1][name]), name
    assert GPTConfig.from_dict(c.to_dict()) == c


@torch.no_grad()
def test_embeddings_are_scaled_by_a_number_of_their_own_precision():
    """Gemma's root of 3584 is 59.75 in bfloat16."""
    c = GPTConfig(V, CONTEXT, 1, 2, 16, 16, embedding_scale=3584**0.5, dropout=0.0)
    assert model_of(c).embedding_scales[torch.float32] == torch.tensor(3584.0).sqrt().item()
    model = model_of(c).for_inference(torch.bfloat16)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].whole()))
    model.hidden(IDS)
    embedded = model.token_embedding.weight[IDS].float() * 59.75
    positions = model.position_embedding.weight[:T].float()
    assert torch.equal(seen[0], embedded + positions)


FEATURES = dict(norm="rmsnorm", position="rope", gated_mlp=True, bias=False, dropout=0.0)
COMPILED = {
    "around": dict(post_norm=True, norm_offset=True, attention_softcap=2.0, logit_softcap=3.0)
    | dict(sliding_window=4, full_attention_layers=(1,), local_rope_theta=30.0, qk_norm=True),
    "parallel": dict(parallel_residual=True, shared_norm=True, norm="layernorm", head_bias=True)
    | dict(rotary_fraction=0.5, no_rope_layers=(1,), embedding_scale=3.0, residual_scale=0.5)
    | dict(qk_norm=True, qk_norm_over="width", clip_qkv=1.0, activation="relu2"),
    "mixture": dict(n_experts=6, n_experts_per_token=2, d_ff_shared=7, dense_layers=(1,))
    | dict(router_norm=True, n_expert_groups=3, n_expert_groups_per_token=2),
    "latent": dict(kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=4)
    | dict(v_head_dim=10, n_kv_heads=4, no_rope_layers=(1,)),
}


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_torch_compile_takes_each_block_and_a_decode_step_whole(name):
    """Nothing about a layer is decided while it runs: no break in the graph (fullgraph raises), and
    no more graphs than there are kinds of layers."""
    c = GPTConfig(V, CONTEXT, 4, 4, 32, 24, **(dict(n_kv_heads=2) | FEATURES | COMPILED[name]))
    model, graphs = model_of(c), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    wanted = model(IDS)[0]
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=count)
    assert torch.equal(model(IDS)[0], wanted) and len(graphs) == 2
    for block in model.blocks:
        block._compiled_call_impl = None
    decode = DecodeCache(model, n_prompts=2, prompt_len=8, n_rows=2, max_len=6)
    model.hidden(IDS[:, :8], cache=decode.filling([0, 1], [8, 8]))
    decode.assign([0, 1])
    step = torch.compile(
        lambda ids: model.logits(model.hidden(ids, cache=decode)), fullgraph=True, backend=count
    )
    bound = 5e-5 * max(1.0, wanted.abs().max().item())
    assert (step(IDS[:, 8:9])[:, 0] - wanted[:, 8]).abs().max() <= bound and len(graphs) == 3
