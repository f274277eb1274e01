"""What each way of packing makes of real documents, and of a small model trained on them on CPUs.

    python benchmarks/packing_ways.py --work /tmp/packing --out benchmarks/results/packing_ways.json

The documents are the functions and methods of the modules on top of this Python's standard library,
in JSON lines; those of every tenth module are for validation. Each way trains the same model from
the same seed for as many windows; its loss is eval.py's, over windows as they come and with
--documents. The model is far too small to say which way is better; the table shows what they do.
"""

import ast
import json
import sys
import sysconfig
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import train  # noqa: E402
from dataset import build_tokenizer  # noqa: E402
from eval import evaluate_perplexity  # noqa: E402

WAYS = {
    "concat": ["--packing", "concat"],
    "document": ["--packing", "document"],
    "noise, mask:8": ["--packing", "noise"],
    "noise, separator:8": ["--packing", "noise", "--packing-noise", "separator:8"],
    "best-fit": ["--packing", "best-fit"],
    "best-fit, document mask": ["--packing", "best-fit", "--document-mask"],
    "cluster": ["--packing", "cluster"],
    "in-context": ["--packing", "in-context"],
}
MODEL = ["--n-layers", 2, "--n-heads", 2, "--d-model", 64, "--d-ff", 256, "--dropout", 0]
VAL_TOKENS = 100_000


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seq-len", type=cli.positive_int, default=512)
    p.add_argument("--batch-size", type=cli.positive_int, default=4)
    p.add_argument("--steps", type=cli.positive_int, default=150)
    args = p.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    train_file, val_file = write_documents(args.work)
    rows = {}
    for name, flags in WAYS.items():
        rows[name] = measure(name, flags, args, train_file, val_file)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


def write_documents(folder: Path) -> tuple[Path, Path]:
    """The functions of each module, as JSON lines: (those for training, for validation)."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = folder / "train.jsonl", folder / "val.jsonl"
    for file, held_out in zip(files, (False, True)):
        chosen = [module for i, module in enumerate(modules) if (i % 10 == 0) == held_out]
        texts = (text for module in chosen for text in functions(module))
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


def functions(module: Path) -> list[str]:
    """The source of each function and method, without those inside of others."""
    source = module.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the library's strings
        body = ast.parse(source).body
    body += [node for n in body if isinstance(n, ast.ClassDef) for node in n.body]
    found = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return ["".join(lines[n.lineno - 1 : n.end_lineno]) for n in found]


def measure(name: str, flags: list[str], args, train_file: Path, val_file: Path) -> dict:
    """A way's counts and losses."""
    import checkpoint

    out = args.work / name.replace(" ", "").replace(",", "-").replace(":", "")
    words = [*MODEL, *flags, "--vocab-size", 257, "--tokenizer-name", "byte"]
    words += ["--train-data", train_file]
    words += ["--seq-len", args.seq_len, "--batch-size", args.batch_size, "--lr", "3e-3"]
    words += ["--num-steps", args.steps, "--warmup-steps", 30, "--eval-steps", args.steps]
    words += ["--device", "cpu", "--log-steps", 50, "--checkpoint-path", out]
    train.main([str(word) for word in words])
    counts = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    model = checkpoint.load_model(out / f"checkpoint-{args.steps}", "float32")
    losses = {}
    for documents in (False, True):
        record = evaluate_perplexity(
            model,
            build_tokenizer("byte"),
            val_data=(str(val_file),),
            max_tokens=VAL_TOKENS,
            seq_len=args.seq_len,
            documents=documents,
        )
        loss = record["metrics"]["loss"]
        losses["within documents" if documents else "as they come"] = [
            loss["value"],
            loss["stderr"],
        ]
    return counts | {"losses": losses}


def print_table(rows: dict) -> None:
    print("| packing | cut | tokens cut off | padding | documents a window | loss | --documents |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        (plain, error), (within, _) = row["losses"].values()
        padding = row["padding"] / (row["tokens"] + row["padding"] + row["separators"])
        print(
            f"| {name} | {row['cut'] / row['documents']:.1%} | "
            f"{row['tokens_cut_off'] / row['tokens']:.1%} | {padding:.2%} | "
            f"{row['documents_per_window']:.2f} | {plain:.4f} ± {error:.4f} | {within:.4f} |"
        )


if __name__ == "__main__":
    cli.run(main)
