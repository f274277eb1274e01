"""Each way of asking a server, against a stub of its answers: the numbers of the model itself."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from builders import PATIENCE, small_mmlu, tiny_model
from stub_natives import LightllmStub, LlamaCppStub, SGLangStub, TGIStub
from stub_server import StubServer

import mmlu_eval
import results
from backends import Sampling
from backends.continuations import Continuations
from backends.endpoint import connect
from backends.local import Local
from endpoints.probing import QUESTIONS
from evaluation import measure
from tokenizer import build_tokenizer

BYTE = build_tokenizer("byte")
NATIVES = {"llama.cpp": LlamaCppStub, "sglang": SGLangStub, "lightllm": LightllmStub}
NATIVES["tgi"] = TGIStub
PROMPTS = [list(text.encode()) for text in ("def f(x):\n", "a b a b", "The question is")]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=1024, n_layers=1)


def endpoint(server, **options):
    found = connect(server.url, None, BYTE, **{"concurrency": 3} | options)
    found.client.pause = 0.002
    return found


def letters(prompts, ids):
    """Rows that ask for the letters after each prompt."""
    rows = [np.array(prompt) for prompt in prompts]
    return Continuations([[]], np.zeros(len(rows), int), rows, [[]] * len(rows), ids)


def continuations(prompts):
    rows = [np.array([*prompt, 7]) for prompt in prompts]
    return Continuations([[]], np.zeros(len(rows), int), rows, [[7, 65 + i] for i in range(3)])


def wanted(model, rows):
    return Local(model, BYTE).score_rows(rows, 4096)


@pytest.mark.parametrize("kind", NATIVES)
def test_native_routes(kind, model):
    with NATIVES[kind](model, context=1024) as server:
        backend = endpoint(server)
        probed = backend.probed
        assert len(server.headers) <= QUESTIONS
        assert probed.server == kind and probed.route == backend.route.path != "/v1/completions"
        assert probed.streams and probed.tokenizer in ("token ids", "counts of tokens")
        assert probed.stop == ("cut" if kind == "llama.cpp" else "kept")
        assert probed.context == (None if kind == "lightllm" else 1024)
        sampling = Sampling(max_new_tokens=9, stop=("e", "\n"))
        ours = {s.prompt_index: s for s in backend.generate(PROMPTS, sampling)}
        for sample in Local(model, BYTE).generate(PROMPTS, sampling):
            own = ours[sample.prompt_index]
            assert own.text.rstrip("\ufffd") == sample.text.rstrip("\ufffd")
            ends = own.finish_reason == "length", sample.finish_reason == "length"
            assert ends[0] == ends[1]
        assert backend.cost()["ttft_seconds"]["p50"] > 0
        rows = continuations(PROMPTS)
        if kind == "llama.cpp":
            with pytest.raises(ValueError, match="gives none of the tokens of a prompt"):
                backend.score_rows(rows)
        else:  # tgi takes texts alone, and these are some
            found = backend.score_rows(rows)
            np.testing.assert_allclose(found.tokens, wanted(model, rows).tokens, atol=1e-4)
        rows = letters(PROMPTS, [65, 66, 120])  # TGI names five, the others are scored
        exact = wanted(model, rows).choices
        found = backend.score_rows(rows)
        assert probed.letters == {"lightllm": "", "tgi": "likeliest"}.get(kind, "by id")
        np.testing.assert_allclose(found.choices, exact, atol=1e-4)


@pytest.mark.parametrize("silent", ["/v1/models", "/v1/completions"])
def test_what_is_waited_for_is_said_before_it_is(silent, model, capsys):
    """By a server that answers nothing until the line was read."""
    with StubServer(model) as server, ThreadPoolExecutor(1) as asking:
        was_read = threading.Event()
        answers = server.posts if silent in server.posts else server.gets
        answer = answers[silent]
        answers[silent] = lambda *asked: was_read.wait(PATIENCE) and answer(*asked)
        found, said = asking.submit(endpoint, server, timeout=PATIENCE), ""
        while "\n" not in said and not found.done():
            said += capsys.readouterr().err
            time.sleep(0.01)
        was_read.set()
        assert found.result().probed.scores == ""
        assert len(server.headers) <= QUESTIONS
    assert said == (
        f"note: {server.url} is probed first: up to {QUESTIONS} short questions, one after the "
        f"other, for each of which it may take {PATIENCE} s (--request-timeout)\n"
    )


def test_sglang_is_asked_from_the_first_place_on(model):
    """So that what prompts share stays in its cache."""
    with SGLangStub(model) as server:
        backend = endpoint(server)
        server.starts.clear()
        backend.score_rows(continuations(PROMPTS))
        assert sorted(server.starts) == sorted(len(prompt) - 1 for prompt in PROMPTS)


def test_lightllm_without_its_flag(model):
    with LightllmStub(model, prompts=False) as server:
        backend = endpoint(server)
        with pytest.raises(ValueError, match="--return_all_prompt_logprobs"):
            backend.score_rows(letters(PROMPTS, [65]))


def test_a_native_route_that_is_not_there_falls_back(model):
    with StubServer(model, owner="sglang") as server:  # behind a router, say
        backend = endpoint(server)
        assert backend.probed.route == "/v1/completions" and backend.probed.server == "sglang"
        assert len(list(backend.generate(PROMPTS, Sampling(2)))) == 3


# ---------------------------------------------------------------------------------------------
# Letters from one generated token


@pytest.mark.parametrize("by_id", [True, False])
def test_letters_of_one_token(by_id, model):
    """One request a prompt; what the likeliest do not name is scored, so all values are exact."""
    with StubServer(model, by_id=by_id, tops=20) as server:
        backend = endpoint(server)
        assert backend.probed.letters == ("by id" if by_id else "likeliest")
        rows, before = letters(PROMPTS, [65, 66, 200]), len(server.bodies)
        found = backend.score_rows(rows)
        np.testing.assert_allclose(found.choices, wanted(model, rows).choices, atol=1e-4)
        asked = server.bodies[before:]
        echoed = [body for body in asked if body.get("echo")]
        assert found.bounded is None and len(asked) - len(echoed) == 3
        assert bool(echoed) is not by_id
        assert backend.ran()["letters_not_told"] == 0


def test_letters_that_nobody_tells_are_bounded_and_counted(model):
    """Of a server that does not score prompts."""
    with StubServer(model, lie="missing", by_id=False, tops=8) as server:
        backend = endpoint(server)
        assert backend.probed.scores and backend.probed.letters == "likeliest"
        exact = wanted(model, letters(PROMPTS, list(range(256)))).choices
        ranked = np.argsort(-exact, axis=1)
        first = int(ranked[0, 0])  # named after the first prompt
        others = [int(i) for i in ranked[0, ::-1] if not (ranked[1:, :8] == i).any()][:3]
        rows = letters(PROMPTS, [*others[:1], first, *others[1:]])
        found = backend.score_rows(rows)
        true = wanted(model, rows).choices
        known = ~found.bounded
        np.testing.assert_allclose(found.choices[known], true[known], atol=1e-4)
        assert (found.choices[found.bounded] > true[found.bounded]).all()
        assert found.choices[0].argmax() == 1 and known[0].tolist() == [False, True, False, False]
        assert backend.ran()["letters_not_told"] == found.bounded.sum() > 3
        with pytest.raises(ValueError, match="log-probabilities come back for"):
            backend.score_rows(continuations(PROMPTS))


def evaluate(server, folder, *flags):
    data = small_mmlu(folder / "mmlu", n=3)
    words = ["--endpoint", server.url, "--tokenizer-name", "byte", "--data-path", data]
    mmlu_eval.main([*map(str, [*words, "--results-dir", folder / "r", *flags])])
    (record,) = results.load_records(folder / "r")
    return record, data


def test_a_question_without_a_letter_has_no_answer(model, tmp_path):
    """The others keep theirs."""
    data = small_mmlu(tmp_path / "mmlu", n=3)
    options = mmlu_eval.Options(data_path=str(data), scoring=("letter",))
    backend, whole = Local(model, BYTE), mmlu_eval.evaluate_mmlu(model, BYTE, data)
    score_rows = backend.score_rows

    def partly(rows, *about, **more):
        found = score_rows(rows, *about, **more)
        bounded = np.zeros(found.choices.shape, bool)
        bounded[1], bounded[2, :2] = True, True
        return replace(found, bounded=bounded)

    backend.score_rows = partly
    found = measure(mmlu_eval.MMLU, backend, mmlu_eval.plan(options, backend.facts))
    wanted = whole.arrays["predicted"].tolist()
    assert found.arrays["predicted"].tolist() == [wanted[0], -1, *wanted[2:]]
    right = whole.arrays["correct"].sum() - whole.arrays["correct"][1]
    assert found["metrics"]["accuracy"]["value"] == right / len(wanted)


# ---------------------------------------------------------------------------------------------
# Chats


def test_chats_are_another_protocol(model, tmp_path):
    with StubServer(model, context=1024) as server:
        record, _ = evaluate(server, tmp_path, "--server", "chat", "--scoring", "generate")
        assert record["protocol"]["dtype"] == "served chats" and "served chats" in record["words"]
        about = record["protocol"]["endpoint"]
        assert (about["server"], about["route"]) == ("chat", "/v1/chat/completions")
        backend = endpoint(server, kind="chat")
        for rows in (letters(PROMPTS, [65]), continuations(PROMPTS)):
            with pytest.raises(ValueError, match=r"chats give none of what .*--scoring generate"):
                backend.score_rows(rows)
        (sample,) = backend.generate(PROMPTS[:1], Sampling(max_new_tokens=6))
        body = server.bodies[-1]
        assert body["messages"] == [{"role": "user", "content": "def f(x):\n"}]
        assert "prompt" not in body and body["min_p"] == 0 and body["stream"]
        text = "<user>def f(x):\n<>"
        (whole,) = Local(model, BYTE).generate([BYTE.encode(text)], Sampling(max_new_tokens=6))
        assert sample.text.rstrip("\ufffd") == whole.text.rstrip("\ufffd")
        with pytest.raises(ValueError, match="special tokens: leave out the options of chats"):
            list(backend.generate([[*PROMPTS[0], 256]], Sampling(2)))


def test_a_server_of_chats_alone(model):
    with StubServer(model, names=["gpt"]) as server:
        del server.posts["/v1/completions"]
        with pytest.raises(ValueError, match="--server chat asks in the server's own"):
            endpoint(server)
        backend = endpoint(server, kind="chat")
        chat = server.posts["/v1/chat/completions"]

        def newer(body):
            if "max_tokens" in body:
                said = "Unsupported parameter: use 'max_completion_tokens' instead"
                return 400, {"error": {"message": said}}
            return chat(body | {"max_tokens": body["max_completion_tokens"]})

        server.posts["/v1/chat/completions"] = newer
        assert len(list(backend.generate(PROMPTS, Sampling(2)))) == 3


# ---------------------------------------------------------------------------------------------
# Samples piece by piece


@pytest.mark.parametrize("streams, usage, seen", [
    ("same", True, True), ("other", True, False), ("none", True, False), ("same", False, True),
])  # fmt: skip
def test_streams_are_used_where_they_come_out_the_same(streams, usage, seen, model):
    with StubServer(model, streams=streams, usage=usage) as server:
        backend = endpoint(server)
        assert backend.probed.streams is seen
        list(backend.generate(PROMPTS, Sampling(max_new_tokens=5)))
        cost = backend.cost()
        assert bool(server.bodies[-1]["stream"]) is seen and ("ttft_seconds" in cost) is seen
        if seen:
            assert cost["ttft_seconds"]["p50"] <= cost["latency_seconds"]["p50"]
            assert {*cost["inter_token_seconds"]} == {"mean", "p50", "p90", "p99"}


@pytest.mark.parametrize("fault", ["truncated", "500", "reset", "429"])
def test_a_stream_that_breaks_off_is_asked_again(fault, model):
    with StubServer(model) as server:
        backend = endpoint(server)
        wanted = [s.text for s in backend.generate(PROMPTS, Sampling(8))]
        server.faults += [fault]
        assert sorted(s.text for s in backend.generate(PROMPTS, Sampling(8))) == sorted(wanted)
        assert backend.cost()["retries"] == 1


def test_an_error_in_the_middle_of_a_stream(model):
    with StubServer(model) as server:
        backend, completion = endpoint(server), server.completion
        failed = []

        def failing(body):
            status, found = completion(body)
            if not failed:
                failed.append(True)
                found = [*found[:1], {"error": {"message": "the engine ran out of memory"}}]
            return status, found

        server.posts["/v1/completions"] = failing
        assert len(list(backend.generate(PROMPTS, Sampling(4)))) == 3
        assert failed and backend.cost()["retries"] == 1
