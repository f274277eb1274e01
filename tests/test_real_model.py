"""A real model through our own path beside transformers': the letters it picks on MMLU, and what it
writes greedily, in float32.

    ROSEVAL_DATA=… ROSEVAL_MODEL=…/smollm2-135m-instruct pytest --slow -s tests/test_real_model.py

ROSEVAL_GGUF: a quantised file of it. Of the Q4_1 of SmolLM2-135M-Instruct all 12,264 losses of 24
windows of WikiText-2 are transformers' own to the bit, 3.484438 nats a token.

ROSEVAL_MODEL: a small model as a Hugging Face directory. SmolLM2-135M-Instruct, torch 2.13,
transformers 5.17, CPU: 250 of 250 letters are the same, log-probabilities differ by at most 2.6e-5
(26.40% are right); 24 of 24 greedy texts are the same, 1,115 tokens in all.
"""

import json
import os
from pathlib import Path

import pytest
import torch

import checkpoint
from backends import Sampling
from backends.local import Local
from mmlu_eval import evaluate_mmlu
from tasks.questions import read_data
from tasks.templates import load_template
from tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SUBJECTS = ["abstract_algebra", "global_facts", "management", "philosophy", "sociology"]
QUESTIONS = 50  # of each
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def both():
    """(our model, our tokenizer, transformers' model, its tokenizer)"""
    directory = os.environ.get("ROSEVAL_MODEL")
    if not directory:
        pytest.skip("needs a real model: set ROSEVAL_MODEL to a Hugging Face directory")
    assert Path(directory).is_dir(), f"ROSEVAL_MODEL={directory} is not a folder"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = checkpoint.load_model(directory, "float32")
    assert ours.is_native
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return ours, build_tokenizer(directory), theirs, tokenizer


@torch.no_grad()
def test_the_letters_of_mmlu(both, data_dir):
    """Five-shot, each prompt whole and alone on transformers' side; ours shares the examples."""
    ours, own_tokenizer, theirs, tokenizer = both
    data = read_data(data_dir / "mmlu", 5, subjects=SUBJECTS, limit=QUESTIONS)
    record = evaluate_mmlu(
        ours, own_tokenizer, data_dir / "mmlu", 5, subjects=SUBJECTS, limit=QUESTIONS
    )
    template = load_template("lm_eval")
    letters = [tokenizer.encode(f" {x}", add_special_tokens=False) for x in "ABCD"]
    assert all(len(ids) == 1 for ids in letters)
    wanted = []
    for q in data.questions:
        head = template.render_head(q.subject, None, data.examples[q.subject], "letter")
        ids = tokenizer.encode(head + template.render_question(q), return_tensors="pt")
        last = theirs(ids, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        wanted.append(last[torch.tensor(letters).flatten()])
    wanted, found = torch.stack(wanted), torch.tensor(record.arrays["logprobs"])
    assert len(wanted) == len(SUBJECTS) * QUESTIONS >= 200
    same = (wanted.argmax(-1) == found.argmax(-1)).sum().item()
    right = record["metrics"]["accuracy"]["value"]
    print(f"\n{same} of {len(wanted)} letters are the same, log-probabilities differ by at most"
          f" {(wanted - found).abs().max():.1e}; {right:.2%} are right")  # fmt: skip
    assert same == len(wanted) and (wanted - found).abs().max() < 1e-3
    assert len(set(found.argmax(-1).tolist())) > 1, "one letter for all says little"


@torch.no_grad()
def test_what_it_writes(both, data_dir):
    """Word problems and the beginnings of paragraphs, in one batch of rows on our side."""
    ours, own_tokenizer, theirs, tokenizer = both
    problems = (data_dir / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in problems[:12]]
    lines = (data_dir / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    texts += [line.strip()[:200].rpartition(" ")[0] for line in lines if len(line) > 400][:12]
    prompts = [tokenizer.encode(text) for text in texts]
    assert len(prompts) == 24 and len({len(ids) for ids in prompts}) > 5
    backend = Local(ours, own_tokenizer)
    end = tokenizer.eos_token_id
    samples = backend.generate(prompts, Sampling(max_new_tokens=NEW_TOKENS), end_ids=(end,))
    found = {sample.prompt_index: sample.token_ids for sample in samples}
    wanted = {}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        written = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=end, eos_token_id=end
            ),
        )
        wanted[i] = [token for token in written[0, len(prompt) :].tolist() if token != end]
    same = sum(wanted[i] == found[i] for i in wanted)
    tokens = sum(map(len, wanted.values()))
    print(f"\n{same} of {len(wanted)} greedy texts are the same, {tokens} tokens in all")
    assert found == wanted and tokens > len(wanted) * NEW_TOKENS / 2


@torch.no_grad()
def test_the_loss_of_a_quantised_file(data_dir):
    """llama.cpp's file, dequantised by transformers and here, token by token."""
    file = os.environ.get("ROSEVAL_GGUF")
    if not file:
        pytest.skip("needs a real quantised model: set ROSEVAL_GGUF to a GGUF file")
    path = Path(file)
    ckpt = checkpoint.open(path)
    assert ckpt.describe()["quantisation"]["rule"].startswith("gguf-Q")
    text = (data_dir / "text" / "wikitext2-raw-test.txt").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(build_tokenizer(path).encode(text)[: 4 * 512]).view(4, 512)
    ours, losses = ckpt.load("float32"), []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for window in ids:
        each = [ours(window[None])[0][0, :-1], theirs(window[None]).logits[0, :-1]]
        losses.append([torch.nn.functional.cross_entropy(x, window[1:]).item() for x in each])
    found, wanted = torch.tensor(losses).double().mean(0).tolist()
    print(f"\n{found:.6f} nats a token, transformers {wanted:.6f}")
    assert abs(found - wanted) < 1e-5
