"""Which matrices of a block have adapters, by the names that transformers gives to its modules.

adapter_symbols(("q_proj", "v_proj"))["on_q"]       # 1: as the formulas name them
"""

from collections.abc import Sequence

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MODULES: dict[str, tuple[str, ...]] = {f"{name}_proj": (name,) for name in MATRICES}
MODULES |= dict.fromkeys(("c_attn", "query_key_value", "qkv_proj"), ("q", "k", "v"))
MODULES |= {"gate_up_proj": ("gate", "up"), "c_proj": ("o", "down")}
MODULES |= dict.fromkeys(("out_proj", "dense"), ("o",))
MODULES |= dict.fromkeys(("c_fc", "fc1", "dense_h_to_4h"), ("up",))
MODULES |= dict.fromkeys(("fc2", "dense_4h_to_h"), ("down",))


def adapter_symbols(targets: Sequence[str] | None) -> dict[str, int]:
    """on_q … on_down: whether a matrix has an adapter, all of them without targets. one_qkv and
    one_gate: whether queries, keys and values, or gate and up, share one. ValueError for a name
    that is not known."""
    for name in targets or ():
        if name not in MODULES:
            raise ValueError(f"--lora-targets {name!r}: known are {', '.join(sorted(MODULES))}")
    held = [MODULES[name] for name in targets or ()]
    chosen = {matrix for matrices in held for matrix in matrices} if held else set(MATRICES)
    symbols = {f"on_{name}": int(name in chosen) for name in MATRICES}
    return symbols | {
        "one_qkv": int(("q", "k", "v") in held),
        "one_gate": int(("gate", "up") in held),
    }
