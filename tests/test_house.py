"""The plan of the house: floors, the map in the README, names, sizes, hints, what loads torch."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recording import sources

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
ROOMS = sorted(p for folder in ("", *FOLDERS) for p in (ROOT / folder).glob("*.py"))

# Each room imports only from floors above its own here; inside a folder, also from files named
# earlier. `backends` stands for the folder's own __init__.py.
FLOORS = [
    "packed launcher",
    "inputs installed streams stats durable recording/sources recording/trackers families/llama "
    "families/dense "
    "tokenizing/byte_bpe plain_yaml "
    "tasks/answers tasks/corpus_scores certainty",
    "resampling cli headstart recording/identity families/mixtures tokenizing/chat_templates "
    "tokenizing/pieces formats/pickles formats/gguf_file formats/vocabularies",
    "families/convert quantisation/names",
    "recording/runs recording/version_1 distributed config tokenizer gpu_kernels/cross_entropy "
    "gpu_kernels/packed_weights gpu_kernels/low_bit_matmul gpu_kernels/kv_codes "
    "gpu_kernels/decode_kernels gpu_kernels/decode_attention gpu_kernels/elementwise "
    "gpu_kernels/token_sampling gpu_kernels/experts gpu_kernels/float8_matmul sandbox/kinds "
    "sandbox/frames costs/gpus backends",
    "formats quantisation/comparison modeling/rotary modeling/mlp modeling/norms endpoints",
    "modeling/attention quantisation/codes quantisation/rules quantisation/linear "
    "endpoints/timing endpoints/client endpoints/answers endpoints/prompts endpoints/kinds "
    "endpoints/completions endpoints/chats endpoints/native endpoints/probing",
    "results sandbox/decoder sandbox/carrier sandbox/peer sandbox/linux sandbox/namespaces "
    "sandbox/jail sandbox/confined sandbox/canary sandbox/clock sandbox/proxy sandbox/packets "
    "sandbox/worker sandbox/handle sandbox/judge costs/adapters costs/formulas costs/quantised "
    "costs/symbols costs/shards costs/flops costs/memory costs/time costs/pipeline costs/plot "
    "costs/printed formats/foreign formats/finding formats/blocks formats/stored formats/inert "
    "formats/tensorfiles formats/shards formats/text formats/tokens formats/documents "
    "formats/archives formats/naming formats/quantised model",
    "backends/pipe backends/parallel quantisation/apply",
    "dataset transformers_model formats/layouts formats/filling formats/row_shards "
    "formats/fingerprints formats/huggingface formats/gptq formats/awq formats/compressed "
    "formats/fp8 formats/bitsandbytes formats/directories "
    "formats/training_state formats/native formats/dialects formats/trained formats/dcp "
    "formats/adapter_config formats/merging formats/adapters formats/conversion formats/extension "
    "formats/dcp_safetensors formats/olmo_core formats/litgpt formats/deepspeed formats/meta "
    "formats/lightning formats/llama2c formats/llmc formats/megatron_args formats/megatron "
    "formats/gguf_config formats/gguf formats/nanochat formats/pt_files formats/readers "
    "formats/inspection",
    "checkpoint backends/sampling backends/kvcache",
    "backends/scoring backends/continuations backends/strips backends/pairs backends/rows "
    "backends/stages backends/steady backends/endings backends/engine backends/wanted",
    "tasks/divergence tasks/windows",
    "backends/states backends/local backends/endpoint backends/reference tasks/chat "
    "tasks/agreement tasks/evalplus tasks/extraction tasks/code_prompts "
    "tasks/problems tasks/scores tasks/layouts tasks/question_files tasks/questions "
    "tasks/templates tasks/choice_sets tasks/prompts tasks/confidence tasks/p_true tasks/choices "
    "tasks/further tasks/choice_tables tasks/programs tasks/word_problems tasks/translation "
    "tasks/drawing tasks/harness",
    "evaluation training/packing training/best_fit training/mixing training/neighbours "
    "training/packing_index training/batches training/log training/options training/plans "
    "training/sources training/schedule training/low_rank training/lora training/fsdp "
    "training/shards training/state",
    "command",
    "reporting/groups reporting/by_bytes reporting/compare reporting/quantised reporting/tables "
    "reporting/exchange reporting/page reporting/charts",
    "serving/fields serving/texts serving/asked serving/scores serving/work serving/ranks "
    "serving/service serving/answers serving/metrics serving/lightllm serving/routes",
    "eval mmlu_eval humaneval_eval gsm8k_eval bleu_eval harness_eval compute train report serve",
    "sweeping/lease sweeping/seen sweeping/trackers sweeping/export sweeping/ledger "
    "sweeping/planner sweeping/served",
    "sweep",
]
NO_TORCH = "cli stats durable config results backends evaluation command tokenizer compute report"
NO_TORCH += " headstart eval mmlu_eval sweep"
NO_TORCH += " sandbox/judge costs/gpus costs/formulas costs/symbols costs/memory costs/time"
NO_TORCH += " costs/shards costs/pipeline"
NO_TORCH += " tasks/programs tasks/questions tasks/choice_sets tasks/answers tasks/word_problems"
NO_TORCH += " tasks/drawing tasks/chat humaneval_eval gsm8k_eval formats/adapter_config"
NO_TORCH += " quantisation/names bleu_eval certainty resampling tasks/translation"
NO_TORCH += " endpoints/probing tasks/divergence"
# Names that packages have which users may have installed: a file or folder of that name would
# shadow them, or be shadowed.
OTHERS = "kernels evaluate lm_eval datasets triton_kernels vllm sglang litgpt deepspeed megatron"
OTHERS += " gguf peft utils common constants"
TAKEN = {*sys.stdlib_module_names, *OTHERS.split()}
OUR_SHADOWS = {"train"}  # no package of that name is known

# What may be larger than usual, and why.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {
    "gpu_kernels/decode_kernels.attend": "one Triton kernel: it cannot be cut",
    "gpu_kernels/low_bit_matmul._matmul_kernel": "one Triton kernel: it cannot be cut",
}
MANY_PARAMETERS: dict[str, str] = {
    "modeling/attention.attend": "the terms of attention itself",
    "backends/engine.generate": "a job's terms, each with a default",
    "backends/scoring.score_windows": "a pass and what it is counted by; train.py calls it too",
    "formats/native.save_checkpoint": "rosetrainer's signature and what was added with defaults",
    "gpu_kernels/decode_attention._": "the operator's shapes: the operator's own parameters",
    "gpu_kernels/decode_attention._decode_torch": "decode_attention's, in plain operations",
    "gpu_kernels/decode_attention._decode_triton": "an operator's schema knows tensors alone",
    "gpu_kernels/decode_attention._launch": "a Triton kernel's arguments",
    "gpu_kernels/decode_attention.decode_attention": "one step's tensors, and attention's terms",
    "gpu_kernels/low_bit_matmul._": "the operator's shapes: the operator's own parameters",
    "gpu_kernels/low_bit_matmul._multiply": "an operator's schema knows tensors alone",
    "training/low_rank._WithLowRank.forward": "torch.compile miscounts a Function's *arguments",
    "training/low_rank._to_y": "an operator's schema knows tensors and numbers alone",
    "training/low_rank._": "the operator's shapes: the operator's own parameters",
    "results.new_record": "the fields of a record, by name",
}
LINES, FUNCTION_LINES, PARAMETERS = 450, 60, 8

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
ORDER = {room: i for i, room in enumerate(" ".join(FLOORS).split())}


def room_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__")


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in sources.statements_that_run(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.replace(".", "/") for name in names}


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_imports_go_strictly_downward(path):
    room = room_of(path)
    if room in FOLDERS and room not in FLOOR:
        assert not imported_rooms(path) & FLOOR.keys(), f"{room}/__init__.py has no floor"
        return
    assert room in FLOOR, f"{room} has no floor: give it one here"
    for name in imported_rooms(path) & FLOOR.keys():
        same_folder = Path(name).parent == Path(room).parent != Path()
        earlier = FLOOR[name] < FLOOR[room] or (same_folder and ORDER[name] < ORDER[room])
        assert earlier, f"{room} must not import {name}"


def test_every_floor_names_rooms_that_are_there():
    assert FLOOR.keys() == {room_of(path) for path in ROOMS} - (set(FOLDERS) - FLOOR.keys())


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name alone: of two of one name, the second could not be collected."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1} - {"__init__.py"}


@pytest.mark.parametrize("room", NO_TORCH.split())
def test_rooms_that_never_load_torch(room):
    code = f"import sys, {room.replace('/', '.')}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_does_no_work():
    """No device is touched, nothing printed, by importing every room."""
    rooms = [room.replace("/", ".") for room in FLOOR]
    code = f"import torch, {', '.join(rooms)}; assert not torch.cuda.is_initialized()"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, ""), out.stderr


def test_no_name_shadows_a_package():
    """Beside what is installed here: what transformers and others look for by these names."""
    installed = set(importlib.metadata.packages_distributions())
    top = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)
    assert not top & (installed | TAKEN) - OUR_SHADOWS


def test_the_map_in_the_readme_names_every_file_once():
    text = (ROOT / "README.md").read_text()
    section = re.search(r"## The house\n.*?```\n(.*?)```", text, re.S)
    assert section, "README.md has no section `## The house` with a map"
    names, folder = [], ""
    for line in section[1].splitlines():
        found = re.match(r"( *)([\w.-]+/?)(?: {2,}|$)", line)
        if not found:
            continue
        indent, name = found.groups()
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            names.append((folder if indent else "") + name)
    assert len(names) == len(set(names)), "a file stands there twice"
    there = {str(p.relative_to(ROOT)) for p in ROOMS if p.name != "__init__.py"}
    there |= {"backends/__init__.py"}
    assert set(names) == there


# ---------------------------------------------------------------------------------------------
# Sizes and hints


def functions_of(path: Path):
    """(qualified name, node, whether its name and its class are public)"""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield f"{room_of(path)}.{node.name}", node, not node.name.startswith("_")
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    public = not (node.name.startswith("_") or inner.name.startswith("_"))
                    yield f"{room_of(path)}.{node.name}.{inner.name}", inner, public


def parameters_of(node) -> list[ast.arg]:
    a = node.args
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [p for p in found if p.arg not in ("self", "cls")]


def test_files_and_functions_are_short_or_say_why():
    long_files = {room_of(p): n for p in ROOMS if (n := len(p.read_text().splitlines())) > LINES}
    functions = [f for path in ROOMS for f in functions_of(path)]
    long_functions = {
        name: n for name, f, _ in functions if (n := f.end_lineno - f.lineno + 1) > FUNCTION_LINES
    }
    many = {name: n for name, f, _ in functions if (n := len(parameters_of(f))) > PARAMETERS}
    for found, allowed in (
        (long_files, LONG_FILES),
        (long_functions, LONG_FUNCTIONS),
        (many, MANY_PARAMETERS),
    ):
        assert found.keys() == allowed.keys(), (
            {name: found[name] for name in found.keys() - allowed.keys()},
            {"no longer": allowed.keys() - found.keys()},
        )


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_public_functions_have_hints(path):
    bare = []
    for name, node, public in functions_of(path):
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        hinted = all(p.annotation for p in named if p.arg not in ("self", "cls"))
        hinted = hinted and node.returns is not None
        if public and not hinted and node.name != "main":
            bare.append(name)
    assert not bare, f"without type hints: {', '.join(bare)}"


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_text_is_utf8_under_every_locale(path):
    """Whoever reads or writes text names the encoding. The cage reads /proc alone, as ASCII."""
    tree = ast.parse(path.read_bytes())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for call in calls if path.parent.name != "sandbox" else ():
        given = {keyword.arg for keyword in call.keywords}
        is_open = isinstance(call.func, ast.Name) and call.func.id == "open" and "open" not in own
        mode = ast.unparse(call.args[1]) if len(call.args) > 1 else ""
        text = (is_open and "b" not in mode) or given & {"text", "universal_newlines"}
        text = text or getattr(call.func, "attr", "") in ("read_text", "write_text", "fdopen")
        assert not text or "encoding" in given, f"{room_of(path)}:{call.lineno}"


def test_one_style_of_ruler():
    """`# ` and 93 dashes, then the section's title on a line of its own."""
    for path in ROOMS:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"# ?-{3,}", line):
                assert line == "# " + "-" * 93, f"{room_of(path)}:{number}"
