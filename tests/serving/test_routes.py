"""What clients get over HTTP, beside the engine and the scorers asked directly."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from servers import serving

from backends import Sampling
from backends.engine import generate
from backends.local import Local
from backends.pairs import score_pairs
from tokenizer import build_tokenizer

BYTE = build_tokenizer("byte")
NAME = "checkpoint-10"


def prompts(n=6, seed=0, longest=40):
    g = np.random.default_rng(seed)
    return [g.integers(0, 256, size).tolist() for size in g.integers(1, longest, n)]


def drawn(model, prompt, n=1, **sampling):
    """Samples of a prompt as the engine alone draws them, under the key that a server uses."""
    import hashlib

    key = hashlib.sha256(np.array(prompt, "<u4").tobytes()).hexdigest()
    asked = Sampling(**sampling)
    found = generate(
        *(model, [prompt], asked), tokenizer=BYTE, n_samples=n, eos_ids=(256,), keys=[key]
    )
    return sorted(found, key=lambda sample: sample.sample_index)


# ---------------------------------------------------------------------------------------------
# Samples


def test_greedy_completions_are_the_engines(client, model):
    asked = prompts()
    choices = client.complete(prompt=asked, max_tokens=12, temperature=0)
    assert [choice["index"] for choice in choices] == list(range(len(asked)))
    for prompt, choice in zip(asked, choices):
        (sample,) = drawn(model, prompt, max_new_tokens=12)
        assert choice["text"] == sample.text
        wanted = {"length": "length"}.get(sample.finish_reason, "stop")
        assert choice["finish_reason"] == wanted and choice["logprobs"] is None


def test_samples_do_not_depend_on_their_neighbours(client, model):
    """Each alone is what the engine draws; all at once, from many threads, the same."""
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 40}
    asked = [{"prompt": p, "seed": s, "n": 2} for s, p in enumerate(prompts(6, seed=1))]
    asked = [one | sampling | {"max_tokens": 6 + 2 * i} for i, one in enumerate(asked)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda body: client.complete(**body), asked))
    for body, choices in zip(asked, together):
        samples = drawn(
            *(model, body["prompt"], 2), **sampling, max_new_tokens=body["max_tokens"],
            seed=body["seed"],
        )  # fmt: skip
        assert [c["text"] for c in choices] == [sample.text for sample in samples]


def test_without_a_seed_samples_differ(client):
    texts = {client.complete(prompt="a", max_tokens=12)[0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_a_sample_ends_before_a_stop_string(client, model):
    prompt = prompts(1, seed=3)[0]
    (sample,) = drawn(model, prompt, max_new_tokens=60)
    stop = next(c for c in sample.text[4:] if c.isascii())
    (choice,) = client.complete(prompt=prompt, max_tokens=60, temperature=0, stop=[stop, "never"])
    assert choice["text"] == sample.text[: sample.text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_stream_is_the_whole_answer_in_pieces(client):
    """Of random bytes, most of them no text, and with stop strings that begin and do not end."""
    for seed, stop in ((0, []), (2, ["=g", "\ufffd\ufffd\ufffd\ufffd", "e"])):
        body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 24, "seed": seed, "stop": stop}
        body |= {"logprobs": 2}
        *chunks, usage, done = client.stream(
            "/v1/completions", **body, stream_options={"include_usage": True}
        )
        assert done == "[DONE]" and usage["choices"] == []
        whole = client.complete(**body)
        for choice in whole:
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            assert "".join(c["text"] for c in own) == choice["text"]
            assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1]["finish_reason"] == choice["finish_reason"]
            assert all(c["logprobs"] for c in own[:-1])
            told = [c["logprobs"]["token_logprobs"] for c in own if c["logprobs"]]
            assert [value for (value,) in told] == choice["logprobs"]["token_logprobs"]
        names = [name for choice in whole for name in choice["logprobs"]["tokens"]]
        tokens = len(names) - names.count("<|endoftext|>")
        assert usage["usage"] == {
            "prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens
        }  # fmt: skip


def test_ends_of_text_can_be_ignored(client):
    """As clients that measure ask: every answer has its length."""
    body = {"prompt": "ab", "max_tokens": 30, "seed": 1, "temperature": 50, "n": 30}
    whole = client.complete(**body)
    body |= {"return_tokens_as_token_ids": True, "logprobs": 0}
    longer = client.complete(**body, ignore_eos=True)
    ended = [i for i, choice in enumerate(whole) if choice["finish_reason"] == "stop"]
    assert ended and {choice["finish_reason"] for choice in longer} == {"length"}
    for i, choice in enumerate(longer):
        ids = choice["logprobs"]["tokens"]
        assert len(ids) == 30 and ("token_id:256" in ids) == (i in ended)
        assert choice["text"].startswith(whole[i]["text"].rstrip("\ufffd"))
    one = {"prompt": "ab", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    assert client.complete(**one, ignore_eos=True)[0]["finish_reason"] == "length"


# ---------------------------------------------------------------------------------------------
# Scores


def test_echoed_log_probabilities_are_those_of_pairs(client, model):
    asked = prompts(7, seed=4, longest=60)
    asked += [[5, 7] * 8, [3] * 256]  # repeated tokens; the whole context
    choices = client.complete(prompt=asked, max_tokens=1, temperature=0, echo=True, logprobs=1)
    backend = Local(model, BYTE)
    for prompt, choice in zip(asked, choices):
        found = choice["logprobs"]
        values, likeliest = found["token_logprobs"], found["top_logprobs"]
        assert {len(part) for part in found.values()} == {len(prompt) + 1}
        assert values[0] is None and likeliest[0] is None and all(likeliest[1:])
        for start in {1, len(prompt) // 2, len(prompt) - 1} - {0, len(prompt)}:
            pair = score_pairs(backend, [(prompt[:start], prompt[start:])], 4096)
            assert sum(values[start:-1]) == pytest.approx(pair.logprobs[0], abs=1e-4)
            tops = [max(own.values()) for own in likeliest[start:-1]]
            assert (values[start:-1] == tops) == pair.greedy[0]
        assert values[-1] == max(likeliest[-1].values())  # the greedy one, to the last bit
        (sample,) = drawn(model, prompt, max_new_tokens=1)
        assert choice["text"] == BYTE.decode(prompt) + sample.text


@torch.no_grad()
def test_the_likeliest_tokens_are_the_models(client, model):
    prompt = prompts(1, seed=5)[0]
    body = {"prompt": prompt, "temperature": 0, "logprobs": 5, "return_tokens_as_token_ids": True}
    (choice,) = client.complete(**body, max_tokens=6, echo=True)
    ids = [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
    assert ids[: len(prompt)] == prompt
    logits = model.logits(model.hidden(torch.tensor([ids])))[0].log_softmax(-1)
    for at, likeliest in enumerate(choice["logprobs"]["top_logprobs"][1:]):
        values, top = logits[at].topk(5)
        wanted = dict(zip(top.tolist(), values.tolist()))
        wanted[ids[at + 1]] = logits[at, ids[at + 1]].item()
        found = {int(name.removeprefix("token_id:")): v for name, v in likeliest.items()}
        assert found == pytest.approx(wanted, abs=1e-4)


def test_every_entry_is_there_where_texts_are_alike(client):
    """All bytes that are no text alone are shown by one character."""
    (choice,) = client.complete(prompt=[200, 201, 202], max_tokens=1, echo=True, logprobs=20,
                                temperature=0)  # fmt: skip
    assert [len(own) for own in choice["logprobs"]["top_logprobs"][1:]] in (
        [20, 20, 20], [21, 20, 20], [20, 21, 20], [21, 21, 20]
    )  # fmt: skip


def test_a_prompt_is_scored_without_an_answer(client):
    (choice,) = client.complete(prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert choice["text"] == "abc" and choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert [len(own or "") for own in choice["logprobs"]["top_logprobs"]] == [0, 1, 1]
    (choice,) = client.complete(prompt="abc", max_tokens=0, echo=True)
    assert choice["text"] == "abc" and choice["logprobs"] is None


def test_the_likeliest_are_told_where_a_text_ends_at_once(checkpoint_path):
    """Letters are read there, of whichever model."""
    body = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "logprobs": 5}
    body |= {"return_tokens_as_token_ids": True}
    with serving(checkpoint_path, max_rows=2) as (client, service):
        (whole,) = client.complete(**body, ignore_eos=True)
        first = whole["logprobs"]["tokens"][0]
        service.work.end_ids = frozenset({int(first.removeprefix("token_id:"))})
        service.work.engine = service.work.make_engine()
        (ended,) = client.complete(**body)
        assert (ended["text"], ended["finish_reason"]) == ("", "stop")
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert ended["logprobs"][name] == whole["logprobs"][name][:1]
        one, done = client.stream("/v1/completions", **body)
        assert one["choices"] == [ended] and done == "[DONE]"
        _, said = client.ask("/v1/completions", body)
        assert said["usage"]["completion_tokens"] == 0


# ---------------------------------------------------------------------------------------------
# Chats


def test_a_chat_is_its_template_completed(client, model):
    text = "[system]be<|endoftext|>[user]hi there<|endoftext|>[assistant]"
    parts = [{"type": "text", "text": part} for part in ("hi ", "there")]
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": parts}]
    body = {"messages": messages, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2}
    status, said = client.ask("/v1/chat/completions", body | {"max_tokens": 9})
    assert status == 200 and said["object"] == "chat.completion"
    prompt = BYTE.encode_batch([text], specials=True)[0].tolist()
    samples = drawn(model, prompt, 2, max_new_tokens=9, temperature=1.0, seed=5)
    for choice, sample in zip(said["choices"], samples, strict=True):
        assert choice["message"] == {"role": "assistant", "content": sample.text}
        entries = choice["logprobs"]["content"]
        assert len(entries) - len(sample.token_ids) == (choice["finish_reason"] == "stop")
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    *chunks, done = client.stream("/v1/chat/completions", **body, max_completion_tokens=9)
    assert done == "[DONE]"
    for i, sample in enumerate(samples):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == sample.text


# ---------------------------------------------------------------------------------------------
# Tokens, and what is said of the model


def test_tokens_go_there_and_back(client):
    status, said = client.ask("/tokenize", {"prompt": "hé<|endoftext|>", "return_token_strs": True})
    assert status == 200 and said["tokens"] == [104, 195, 169, 256] and said["count"] == 4
    assert said["max_model_len"] == 256 and said["token_strs"][0] == "h"
    _, said = client.ask("/detokenize", {"tokens": [104, 195, 169, 256]})
    assert said["prompt"] == said["text"] == "hé<|endoftext|>"
    _, said = client.ask("/tokenizer_info")
    assert said["eos_token"] == "<|endoftext|>" and said["bos_token"] is None
    assert "[assistant]" in said["chat_template"]
    _, said = client.ask("/v1/models")
    assert said["data"][0]["id"] == NAME and said["data"][0]["max_model_len"] == 256
    assert client.ask("/health") == (200, {"status": "ok"})
