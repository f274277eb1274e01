"""The eight worked examples of Wei et al. (2022) as JSON lines, for gsm8k_eval.py.

    python scripts/cot_shots.py data/gsm8k/cot_shots.jsonl [gsm8k-cot.yaml]
    python scripts/cot_shots.py data/gsm8k/cot_llama_shots.jsonl gsm8k-cot-llama.yaml

From lm-evaluation-harness's gsm8k-cot.yaml: the file named, else that of the lm_eval package
installed here. They are others' text, which is why they do not lie in this repository.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import durable  # noqa: E402
from config import load_yaml  # noqa: E402


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("yaml", type=Path, nargs="?")
    args = p.parse_args(argv)
    source = args.yaml or installed()
    try:
        samples = load_yaml(source)["fewshot_config"]["samples"]
        lines = [{"question": s["question"], "answer": s["target"]} for s in samples]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: no fewshot_config.samples with {error}") from None
    durable.write_atomic(args.out, "".join(durable.dumps(line) + "\n" for line in lines))
    print(f"{args.out}: {len(lines)} examples")


def installed() -> Path:
    found = importlib.util.find_spec("lm_eval")  # finds it without importing it
    if found is None or found.origin is None:
        raise ValueError("name lm-eval's gsm8k-cot.yaml, or install it: pip install lm_eval")
    return Path(found.origin).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"


if __name__ == "__main__":
    cli.run(main)
