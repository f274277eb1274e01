"""Megatron's files, written by its documented rules: what the tests of its formats share.

state = core_state(model)                       # Megatron-Core's names, whole tensors
path = ranks(folder, state, config, T=2, P=2)   # iter_0000100/mp_rank_…/model_optim_rng.pt
path = torch_dist(folder, state, config, …)     # iter_0000100/.metadata …
"""

import argparse
import json
import re
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_dcp

PAD, MULTIPLE = 7, 8  # rows that only fill up, to a multiple of 8


def core_state(model, padding=PAD) -> dict[str, torch.Tensor]:
    """The weights of a GPTModel under Megatron-Core's names, with rows of padding."""
    c, theirs = model.config, {}
    padding = padding if c.vocab_size % MULTIPLE else 0
    for name, p in model.named_parameters():
        t = p.detach().clone()
        if "qkv_proj" in name:  # [q; k; v] to [q … q, k, v] of each group
            H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
            q, k, v = t.split([H * D, G * D, G * D])
            parts = [x.reshape(G, -1, D, *t.shape[1:]) for x in (q, k, v)]
            t = torch.cat(parts, dim=1).reshape(t.shape)
        if name in ("token_embedding.weight", "lm_head.weight"):
            t = torch.cat([t, torch.full((padding, t.shape[1]), 9.0)])
        for ours, new in (
            (r"^token_embedding", "embedding.word_embeddings"),
            (r"^position_embedding", "embedding.position_embeddings"),
            (r"^blocks\.", "decoder.layers."),
            (r"\.ln1\.", ".input_layernorm."),
            (r"\.ln2\.", ".pre_mlp_layernorm."),
            (r"attn\.qkv_proj", "self_attention.linear_qkv"),
            (r"attn\.out_proj", "self_attention.linear_proj"),
            (r"attn\.(q|k)_norm", r"self_attention.\1_layernorm"),
            (r"mlp\.(experts\.)?fc", r"mlp.\1linear_fc"),
            (r"mlp\.shared\.fc", "mlp.shared_experts.linear_fc"),
            (r"mlp\.shared_gate\.weight", "mlp.shared_experts.gate_weight"),
            (r"router\.choice_bias", "router.expert_bias"),
            (r"^ln_f", "decoder.final_layernorm"),
            (r"^lm_head", "output_layer"),
        ):
            name = re.sub(ours, new, name)
        if ".experts." in name:
            own = name.replace(".experts.", ".experts.local_experts.{}.")
            theirs |= {own.format(e): one.clone() for e, one in enumerate(t)}
        else:
            theirs[name] = t
    return theirs


def of_experts(c) -> dict:
    """Settings of a mixture."""
    sigmoid = c.router_score == "sigmoid"
    return {
        "num_experts": c.n_experts, "moe_router_topk": c.n_experts_per_token,
        "moe_ffn_hidden_size": c.d_ff_expert, "moe_router_score_function": c.router_score,
        "moe_router_pre_softmax": not sigmoid and not c.router_norm,
        "moe_layer_freq": [int(i not in c.dense_layers) for i in range(c.n_layers)],
        "moe_shared_expert_intermediate_size": c.d_ff_shared or None,
        "moe_shared_expert_gate": c.shared_gate,
        "moe_router_enable_expert_bias": c.router_choice_bias,
        "moe_router_topk_scaling_factor": c.router_scale if c.router_scale != 1 else None,
        "moe_router_num_groups": c.n_expert_groups if c.n_expert_groups > 1 else None,
        "moe_router_group_topk": c.n_expert_groups_per_token if c.n_expert_groups > 1 else None,
    }  # fmt: skip


def about(config, T, P, step, args=(), version=3.0, **changes) -> dict:
    """What lies beside the weights. args: None for no settings at all."""
    c = config
    scaling = c.rope_scaling or {}
    said = {
        "num_layers": c.n_layers, "hidden_size": c.d_model, "num_attention_heads": c.n_heads,
        "ffn_hidden_size": c.d_ff, "kv_channels": c.head_dim, "norm_epsilon": c.norm_eps,
        "group_query_attention": c.n_kv_heads != c.n_heads, "num_query_groups": c.n_kv_heads,
        "max_position_embeddings": c.max_position_embeddings, "seq_length": 16,
        "position_embedding_type": "rope" if c.position == "rope" else "learned_absolute",
        "rotary_base": c.rope_theta, "rotary_percent": c.rotary_fraction,
        "rotary_seq_len_interpolation_factor": scaling.get("factor"),
        "normalization": "RMSNorm" if c.norm == "rmsnorm" else "LayerNorm",
        "apply_layernorm_1p": c.norm_offset, "add_bias_linear": c.bias,
        "add_qkv_bias": c.qkv_bias and not c.bias, "qk_layernorm": c.qk_norm,
        "swiglu": c.gated_mlp, "squared_relu": c.activation == "relu2",
        "bias_gelu_fusion": c.activation == "gelu_new",
        "untie_embeddings_and_output_weights": not c.tie_embeddings,
        "make_vocab_size_divisible_by": MULTIPLE // T, "vocab_size": c.vocab_size,
        "tensor_model_parallel_size": T, "pipeline_model_parallel_size": P, "num_experts": None,
    } | changes  # fmt: skip
    found = {"iteration": step, "rng_state": [{"np_rng_state": ("MT19937", [1, 2])}]}
    if args is not None:
        found["args"] = argparse.Namespace(**said)
    if version is not None:
        found["checkpoint_version"] = version
    return found


def before_core(name: str) -> str:
    """A name of Megatron-Core as it was before."""
    name = name.replace("output_layer", "language_model.output_layer")
    name = re.sub(r"^embedding\.", "language_model.embedding.", name)
    name = re.sub(r"^decoder\.", "language_model.encoder.", name)
    for now, then in (
        ("linear_qkv", "query_key_value"), ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"), ("linear_fc2", "dense_4h_to_h"),
        ("pre_mlp_layernorm", "post_attention_layernorm"),
    ):  # fmt: skip
        name = name.replace(now, then)
    return name


def _share(name: str, t: torch.Tensor, rank: int, T: int, gated: bool) -> torch.Tensor:
    """The part of a weight that one tensor rank has."""
    if gated and t.shape and "linear_fc1." in name and "layer_norm" not in name:
        return torch.cat([half.chunk(T)[-1 if rank else 0] for half in t.chunk(2)]).clone()
    if re.search(r"word_embeddings|output_layer|linear_(qkv|fc1)\.(weight|bias)$", name):
        return t.chunk(T)[rank].clone() if t.shape else t
    if re.search(r"linear_(proj|fc2)\.weight$", name):
        return t.chunk(T, dim=1)[rank].clone() if t.dim() > 1 else t
    return t.clone()


def _nested(state: dict) -> dict:
    """{language_model: {embedding: {word_embeddings: {weight: …}}, encoder: {layers.0.…}}}"""
    found: dict = {}
    for name, t in state.items():
        into, parts = found, name.split(".")
        depth = 2 if "encoder" in parts else len(parts) - 1
        for part in parts[:depth]:
            into = into.setdefault(part, {})
        into[".".join(parts[depth:])] = t
    return found


def ranks(folder, state, config, T, P, virtual=1, cuts=None, rename=None, step=100, E=1, **said):
    """One file a rank; cuts: the first layer of each stage; E ranks of experts."""
    for e in range(E):
        said |= {"expert_model_parallel_size": E} if E > 1 else {}
        of_rank = {name: t for name, t in state.items() if _is_of(name, e, E, config.n_experts)}
        tail = f"_{e:03d}" if E > 1 else ""
        path = _ranks(folder, of_rank, config, T, P, virtual, cuts, rename, step, tail, said)
    return path


def _is_of(name, e, E, n):
    expert = re.search(r"local_experts\.(\d+)\.", name)
    return not expert or int(expert[1]) // (n // E) == e


def _locally(name, n):
    """An expert's number among the n of its rank."""
    return re.sub(r"(?<=local_experts\.)\d+", lambda m: str(int(m[0]) % n), name)


def _ranks(folder, state, config, T, P, virtual, cuts, rename, step, tail, said) -> Path:
    experts = len({m[1] for n in state if (m := re.search(r"local_experts\.(\d+)\.", n))})
    path, L = Path(folder) / f"iter_{step:07d}", config.n_layers
    cuts = cuts or [L * i // (P * virtual) for i in range(P * virtual + 1)]
    for t in range(T):
        for p in range(P):
            contents = about(config, T, P, step, **said)
            for v in range(virtual):
                stage = v * P + p
                own = {}
                for name, tensor in state.items():
                    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
                    first, last = stage == 0, stage == P * virtual - 1
                    here = first if name.startswith("embedding") else last
                    if layer:
                        here = cuts[stage] <= int(layer[1]) < cuts[stage + 1]
                        local = int(layer[1]) - cuts[stage]
                    if here:
                        new = re.sub(r"layers\.\d+", f"layers.{local}", name) if layer else name
                        new = _locally(new, experts) if experts else new
                        own[new] = _share(name, tensor, t, T, config.gated_mlp)
                if config.tie_embeddings and last and not first:  # the head's copy
                    table = _share(
                        "word_embeddings", state["embedding.word_embeddings.weight"], t, T, False
                    )
                    own["word_embeddings_for_head.weight" if rename else "output_layer.weight"] = (
                        table
                    )
                own["decoder.final_layernorm._extra_state"] = None
                if rename:
                    own = _nested({rename(name): x for name, x in own.items()})
                contents["model" if virtual == 1 else f"model{v}"] = own
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if P > 1 else "") + tail
            (path / name).mkdir(parents=True, exist_ok=True)
            torch.save(contents, path / name / "model_optim_rng.pt")
    (path.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
    return path


def torch_dist(folder, state, config, stacked, common, halves, step=100, **said) -> Path:
    """torch's own container, with Megatron-Core's names: layers stacked in one tensor or not,
    settings in common.pt or an object of the container, halves of a gated MLP apart or not."""
    path, found = Path(folder) / f"iter_{step:07d}", {}
    each: dict = {}
    for name, t in state.items():
        each.setdefault(name.replace("local_experts", "experts"), []).append(t)
    stacks: dict = {}
    for name, (t,) in each.items():  # experts in one tensor
        alike = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        stacks.setdefault(alike, []).append(t)
    state = {n: torch.stack(t) if ".experts.experts." in n else t[0] for n, t in stacks.items()}
    for name, t in state.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if halves and config.gated_mlp and "linear_fc1." in name:
            gate, up = t.chunk(2, dim=1 if ".experts.experts." in name else 0)
            parts = {f"{name}_w": gate.clone(), f"{name}_v": up.clone()}
        else:
            parts = {name: t}
        for part, values in parts.items():
            if layer and stacked:
                found.setdefault(re.sub(r"layers\.\d+", "layers", part), []).append(values)
            else:
                found[part] = values
    found = {name: torch.stack(t) if isinstance(t, list) else t for name, t in found.items()}
    found["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.ones(3)
    found["chained_0.optimizer.state.fp32_param"] = torch.ones(3)
    found["decoder.layers.self_attention.core_attention._extra_state/shard_0_2"] = [1]
    beside = about(config, 1, 1, step, **said)
    if not common:
        found["common_state/shard_0_1"] = beside  # not flattened: one object
    with warnings.catch_warnings(action="ignore"):
        torch_dcp.save(found, checkpoint_id=path, no_dist=True,
                       planner=torch_dcp.DefaultSavePlanner(flatten_state_dict=False))  # fmt: skip
    if common:
        torch.save(beside, path / "common.pt")
    (path / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    return path
