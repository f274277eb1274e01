"""What others call their weights and files: so that what is not read is refused by its name.

    whose(["transformer.h.0.self_attention.query_key_value.weight", …])    # "Falcon's or BLOOM's"
    what_is(Path("a.nemo"))         # "an archive of NeMo 1, which is not read"

A reader for one of them makes its row here superfluous: naming.py knows the families that are read.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

# Whose names these are: a pattern that some name matches, and one that none does.
NAMES: tuple[tuple[str, str, str], ...] = (
    ("those of a PEFT adapter: give its directory, with its config", r"\.lora_\w+", ""),
    ("nanochat's", r"\bh\.\d+\.attn\.c_q\.", ""),
    ("litgpt's", r"\bh\.\d+\.(norm_1|attn\.qkv|attn\.attn|mlp\.fc_1)\.", ""),
    ("Meta's (Llama, llama2.c, torchtitan)", r"layers\.\d+\.attention\.(wq|qkv_linear)\b", ""),
    ("OLMo-core's", r"blocks\.\d+\.attention\.w_q\.", ""),
    ("Megatron's", r"\.self_attention\.linear_qkv\.", ""),
    ("Falcon's or BLOOM's", r"\bh\.\d+\.self_attention\.query_key_value\.", ""),
    ("GPT-J's", r"\bh\.\d+\.mlp\.fc_in\.", ""),
    ("OPT's", r"decoder\.layers\.\d+\.self_attn\.", ""),
    ("those of a mixture of experts", r"\.experts\.|\.block_sparse_moe\.", ""),
    ("those of layer norms, as StableLM has them", r"layers\.\d+\.input_layernorm\.bias", ""),
    ("those of a model with a part for images", r"(^|\.)(vision_tower|visual|vision_model)\.", ""),
)
# Who made numbers of fewer bits and scales of weights, by what is beside or in place of these. Most
# are read where a directory's config.json says how it was done
UNSAID = (
    ", and not all is there that reads them: a config.json whose quantization_config says how, "
)
UNSAID += "and codes and scales of every matrix"
QUANTISED = {
    r"\.weight_scale_inv$": "FP8 with a scale for each block" + UNSAID,
    r"\.weight\.(absmax|quant_)|\.SCB$": "bitsandbytes" + UNSAID,
    r"\.(qweight|qzeros)$": "GPTQ or AWQ" + UNSAID,
    r"_proj_(blocks|scales)$": "MXFP4: name a copy in bfloat16",
    r"\.(weight|input)_scale_2$": "ModelOpt: name the original",
    r"\.(weight|input)_(packed|scale|zero_point)$": "compressed-tensors or ModelOpt" + UNSAID,
}
DEEPSPEED = "a directory of DeepSpeed's without the directory of a tag, such as global_step100"
MEGATRON = "a directory of Megatron's without the directory of an iteration, such as iter_0001000"
DIRECTORIES = {  # the name of a file that tells what its directory is
    r"zero_to_fp32\.py": DEEPSPEED,
    r"latest_checkpointed_iteration\.txt": MEGATRON,
    r"flax_model\.msgpack|tf_model\.h5": "weights of Flax or TensorFlow, which are not read",
}
FILES = {
    ".nemo": "an archive of NeMo 1, which is not read",
}


def whose(names: Iterable[str]) -> str | None:
    """Whose weights have such names, as far as that is known here."""
    text = "\n".join(names)
    if how := quantised(text.splitlines()):
        return f"those of weights quantised by {how}"
    for owner, some, none in NAMES:
        if re.search(some, text, re.M) and not (none and re.search(none, text, re.M)):
            return owner
    return None


def quantised(names: Iterable[str]) -> str | None:
    """By whom weights of such names were quantised, and what to do; None if they were not."""
    text = "\n".join(names)
    return next((how for some, how in QUANTISED.items() if re.search(some, text, re.M)), None)


def what_is(path: Path) -> str | None:
    """What a directory or file is, by names of files, where it is nothing that is read."""
    if not os.path.isdir(path):
        return FILES.get(path.suffix) if os.path.isfile(path) else None
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return None
    for pattern, what in DIRECTORIES.items():
        for name in names:
            if re.fullmatch(pattern, name):
                return f"{what} ({name})"
    return None
