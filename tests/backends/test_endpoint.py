"""backends/endpoint.py and what lies below it, against a server on loopback: the same numbers as
from the model asked directly, and each lie and fault of servers named instead of scored."""

import json

import numpy as np
import pytest
from builders import small_humaneval, small_mmlu, tiny_model, token_shard, write_jsonl
from stub_server import LIES, StubServer

import eval as perplexity
import gsm8k_eval
import humaneval_eval
import mmlu_eval
import results
from backends import Sampling
from backends.continuations import Continuations
from backends.endpoint import connect, seed_of
from backends.local import Local
from durable import read_journal
from endpoints.client import Client, Gone, Refused, in_flight, message_of, retry_after, root_of
from tokenizer import build_tokenizer

BYTE = build_tokenizer("byte")
PROMPTS = [list(text.encode()) for text in ("def f(x):\n", "a b a b", "The question is", "Yes")]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=1024, n_layers=1)


@pytest.fixture
def server(model):
    with StubServer(model) as found:
        yield found


def endpoint(server, **options):
    found = connect(server.url, "tiny", BYTE, **{"concurrency": 4} | options)
    found.client.pause = 0.002
    return found


# ---------------------------------------------------------------------------------------------
# The same as the model


def mixed_rows():
    """Rows with a prefix or none, targets in the middle, alternatives in the last place, and one
    whose target is not the token that it goes on with."""
    rng = np.random.RandomState(0)
    ids = [rng.randint(0, 256, n) for n in (9, 5, 12, 7)]
    targets = [[*ids[0][-2:], 7], [3, 4, 5], [], [11, *ids[3][-1:], 9]]
    prefixes = [[], rng.randint(0, 256, 20).tolist()]
    return Continuations(
        prefixes, np.array([0, 1, 1, 0]), ids, targets, [65, 66, 67], np.array([1, 2, 1, 1])
    )


def test_rows_are_scored_as_by_the_model_itself(server, model):
    backend, rows = endpoint(server), mixed_rows()
    ours = backend.score_rows(rows, greedy=True)
    wanted = Local(model, BYTE).score_rows(rows, 4096, greedy=True)
    for name in ("choices", "targets", "tokens"):
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), atol=1e-4)
    assert (ours.greedy == wanted.greedy).all() and (ours.likeliest == wanted.likeliest).all()
    cost = backend.cost()
    assert cost["requests"] == 10 and cost["retries"] == 0
    assert 0 < cost["latency_seconds"]["p50"] <= cost["latency_seconds"]["p99"]


def texts(samples):
    """By prompt, without a character whose bytes have not all come."""
    return {s.prompt_index: s.text.rstrip("\ufffd") for s in samples}


def test_samples_are_those_of_the_model_itself(server, model):
    sampling = Sampling(max_new_tokens=12, stop=("e", "\n"))
    backend = endpoint(server)
    ours = sorted(backend.generate(PROMPTS, sampling), key=lambda s: s.prompt_index)
    wanted = sorted(Local(model, BYTE).generate(PROMPTS, sampling), key=lambda s: s.prompt_index)
    assert texts(ours) == texts(wanted)
    assert [s.finish_reason == "length" for s in ours] == [
        s.finish_reason == "length" for s in wanted
    ]
    assert 1 < server.most_under_way <= 4


def test_every_sampling_parameter_is_sent_and_the_key_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("ROSEVAL_API_KEY", "sk-secret")
    backend = endpoint(server)
    sampling = Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, top_k=30, stop=("x",), seed=3)
    list(backend.generate(PROMPTS[:1], sampling, 2, keys=["task"]))
    for body in server.bodies[-2:]:
        assert body["prompt"] == PROMPTS[0] and body["max_tokens"] == 5 and body["n"] == 1
        assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 30)
        assert body["stop"] == ["x"] and body["repetition_penalty"] == 1 and body["min_p"] == 0
        assert body["presence_penalty"] == body["frequency_penalty"] == 0
    assert {b["seed"] for b in server.bodies[-2:]} == {seed_of(3, "task", s) for s in (0, 1)}
    assert {h.get("Authorization") for h in server.headers} == {"Bearer sk-secret"}
    told = json.dumps([backend.cost(), backend.ran(), backend.info, repr(backend.facts)])
    assert "sk-secret" not in told


# ---------------------------------------------------------------------------------------------
# The commands


def evaluate(script, server, folder, *flags, code=None):
    """The record that a command leaves."""
    words = ["--endpoint", server.url, "--tokenizer-name", "byte", "--results-dir", folder / "r"]
    script.main([*map(str, words), *map(str, flags)])
    (record,) = results.load_records(folder / "r")
    return record


@pytest.mark.parametrize("scoring", ["letter", "continuation", "generate"])
def test_mmlu(scoring, model, tmp_path):
    data, flags = small_mmlu(tmp_path / "mmlu", n=3), ["--num-few-shot", 1, "--scoring", scoring]
    with StubServer(model, context=1024) as server:
        found = evaluate(mmlu_eval, server, tmp_path, "--data-path", data, *flags)
    wanted = mmlu_eval.evaluate_mmlu(model, BYTE, data, 1, scoring=scoring)
    assert found["metrics"]["accuracy"] == wanted["metrics"]["accuracy"]
    arrays = results.load_arrays(found)
    np.testing.assert_array_equal(arrays["predicted"], wanted.arrays["predicted"])
    if scoring != "generate":
        np.testing.assert_allclose(arrays["logprobs"], wanted.arrays["logprobs"], atol=1e-4)
    about = found["protocol"]["endpoint"]
    assert about["server"] == "vllm" and about["scores"] == "" and about["against_generation"]
    assert found["checkpoint"]["name"] == "tiny" and "served" in found["words"]
    cost = found["cost"]
    assert cost["requests_per_second"] * cost["seconds"] == pytest.approx(cost["requests"])


def test_perplexity_of_every_window(server, model, tmp_path):
    flags = ["--data-mode", "fineweb_npy", "--val-npy", token_shard(tmp_path / "x.npy", 301)]
    flags += ["--seq-len", 50, "--stride", 20, "--bos", "on"]
    found = evaluate(perplexity, server, tmp_path, *flags)
    wanted = perplexity.evaluate_perplexity(
        *(model, BYTE),
        data_mode="fineweb_npy",
        val_npy=(str(tmp_path / "x.npy"),),
        **{"seq_len": 50, "stride": 20, "bos": "on"},
    )
    arrays = results.load_arrays(found)
    np.testing.assert_allclose(arrays["nll"], wanted.arrays["nll"], atol=1e-3)
    np.testing.assert_array_equal(arrays["count"], wanted.arrays["count"])
    assert found["metrics"]["loss"]["value"] == pytest.approx(
        wanted["metrics"]["loss"]["value"], abs=1e-5
    )
    assert found["data"]["bytes"] == wanted["data"]["bytes"]


def words_of_humaneval(path):
    return ["--data-path", small_humaneval(path), "--max-new-tokens", 8, "--workers", 1]


def test_humaneval_goes_on_from_its_journal(model, tmp_path, capsys):
    """After a server that died: what had arrived is not asked for again, at another concurrency."""
    words = [*words_of_humaneval(tmp_path / "p.jsonl"), "--num-samples", 4, "--temperature", 1]
    with StubServer(model) as server:
        backend = endpoint(server)
        server.dead_after = 2 * len(server.bodies) + 5  # five samples after the same probe
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("endpoints.client.PAUSE", 0.001)
            patch.setattr(Client.__init__, "__defaults__", (1, 600.0, 0.001))
            with pytest.raises(Gone, match=r"5 of 12 samples are there: the same command goes on"):
                evaluate(humaneval_eval, server, tmp_path, *words, "--concurrency", 1)
        assert not list(results.load_records(tmp_path / "r"))
        (journal,) = (tmp_path / "r").rglob("journal-*")
        assert sum("completion" in entry for entry in read_journal(journal)[0]) == 5
        server.dead_after, before = None, len(server.bodies)
        record = evaluate(humaneval_eval, server, tmp_path, *words, "--concurrency", 3)
        drawn = len(server.bodies) - before - backend_requests(backend, server)
    assert drawn == 7 and record["cost"]["samples_resumed"] == 5
    assert record["checkpoint"]["fingerprint"] == backend.probed.fingerprint
    capsys.readouterr()


def backend_requests(backend, server):
    """Completions that a probe of this server takes."""
    before = len(server.bodies)
    connect(server.url, "tiny", BYTE)
    return len(server.bodies) - before


def test_gsm8k_with_a_prompt_that_is_refused(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ROSEVAL_API_KEY", "sk-secret")
    (tmp_path / "g").mkdir()
    shots = [{"question": f"{i} + 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(8)]
    write_jsonl(tmp_path / "g/train.jsonl", shots)
    asked = [{"question": f"{q}?", "answer": "#### 2"} for q in ("one", "FORBIDDEN", "three")]
    write_jsonl(tmp_path / "g/test.jsonl", asked)
    flags = ["--data-path", tmp_path / "g", "--num-few-shot", 1, "--max-new-tokens", 8]
    with StubServer(model, refuse="FORBIDDEN", refusal=(422, "not this one")) as server:
        record = evaluate(gsm8k_eval, server, tmp_path, *flags)
    assert record["breakdown"]["finish"]["refused"] == record["protocol"]["refused"] == 1
    out, err = capsys.readouterr()
    assert "a prompt: 422 not this one" in err and "sk-secret" not in out + err
    files = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert len(files) > 2 and not any(b"sk-secret" in path.read_bytes() for path in files)
    wanted = gsm8k_eval.evaluate_gsm8k(
        model, BYTE, tmp_path / "g", num_few_shot=1, max_new_tokens=8
    )
    assert record["metrics"]["accuracy"]["n"] == wanted["metrics"]["accuracy"]["n"] == 3


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--checkpoint-path c", "--checkpoint-path goes with checkpoints"),
        ("--batch-size 3", "--batch-size goes with checkpoints"),
        ("--dtype fp32", "--dtype goes with checkpoints"),
    ],
)
def test_flags_that_say_nothing_of_a_server(flags, said, tmp_path):
    data = ["--data-path", str(small_mmlu(tmp_path / "m"))]
    with pytest.raises(ValueError, match=said):
        mmlu_eval.main(["--endpoint", "http://h:1", *data, *flags.split()])
    with pytest.raises(ValueError, match="--concurrency goes only with --endpoint"):
        mmlu_eval.main(["--checkpoint-path", "c", "--concurrency", "2", *data])
    with pytest.raises(ValueError, match="--tokenizer-name"):
        mmlu_eval.main(["--endpoint", "http://h:1", *data])


# ---------------------------------------------------------------------------------------------
# Lies

SAID = {
    "constant": "the same value wherever it stands",
    "by_id": "the same value wherever it stands",
    "shifted": "change with what follows|not the one it is generated with",
    "prefix_dependent": "change with what follows",
    "null": "None comes back where a log-probability",
    "nan": "nan comes back where a log-probability",
    "missing": "log-probabilities come back for",
    "ignored_echo": "no log-probabilities of the prompt",
    "wrong_count": "tokens were read where",
    "number_first": "the first token of a prompt",
}


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_becomes_a_score(lie, model):
    with StubServer(model, lie) as server:
        if lie in ("two_choices", "other_index"):  # of no use for anything
            with pytest.raises(ValueError, match="come"):
                endpoint(server)
            return
        backend = endpoint(server)
        if lie == "only_chosen":
            backend.score_rows(mixed_rows())
            with pytest.raises(ValueError, match="no likelier tokens are named"):
                backend.score_rows(mixed_rows(), greedy=True)
            return
        with pytest.raises(ValueError, match=SAID[lie]):
            backend.score_rows(mixed_rows())
        letters = set() if lie == "ignored_echo" else {"score_rows"}  # these it tells truly
        assert dict(backend.facts.lacks).keys() == {"score_rows", "score_windows"} - letters
        (sample,) = backend.generate(PROMPTS[:1], Sampling(max_new_tokens=2))  # this it can do
        assert sample.finish_reason == "length"


@pytest.mark.parametrize("lie", ["null", "missing", "nan", "two_choices"])
def test_a_server_that_begins_to_lie_after_its_probe(lie, server):
    backend = endpoint(server)
    server.lie = lie
    with pytest.raises(ValueError, match="no score is written"):
        backend.score_rows(mixed_rows())


def test_what_a_probe_finds_out(model):
    with StubServer(model, keeps_stop=True) as server:
        probed = endpoint(server).probed
        assert (probed.server, probed.context, probed.token_ids) == ("vllm", 256, True)
        assert (probed.seed, probed.samples, probed.stop) == (True, True, "kept")
        assert (probed.adds_bos, probed.tokenizer, probed.greedy) == (False, "token ids", "")
        assert endpoint(server).probed == probed  # what changes with time is no part of it
    with StubServer(model, seeds=False, bos=True, tokenize=False, owner="me") as server:
        other = endpoint(server).probed
        assert (other.server, other.seed, other.stop) == ("llama-cpp-python", False, "cut")
        assert (other.adds_bos, other.tokenizer) == (True, "counts of tokens")
    with StubServer(tiny_model("llama", seed=9)) as server:
        assert endpoint(server).probed.fingerprint != probed.fingerprint
    with StubServer(model, hot=False) as server:
        backend = endpoint(server)
        with pytest.raises(ValueError, match="samples do not depend on --temperature"):
            list(backend.generate(PROMPTS, Sampling(temperature=0.5)))


def test_a_server_that_takes_only_texts(model):
    with StubServer(model, ids=False, bos=True) as server:
        backend = endpoint(server)
        assert backend.probed.scores == "it takes no token ids"
        with pytest.raises(ValueError, match="takes no token ids, and no text"):
            list(backend.generate(PROMPTS, Sampling(max_new_tokens=4)))  # it would add a BOS
    with StubServer(model, ids=False) as server:
        backend = endpoint(server)
        ours = texts(backend.generate(PROMPTS, Sampling(8)))
        assert isinstance(server.bodies[-1]["prompt"], str)
        wanted = Local(model, BYTE).generate(PROMPTS, Sampling(8))
        assert ours == texts(wanted)
        with pytest.raises(ValueError, match="no text stands for"):
            list(backend.generate([[255, 254]], Sampling(4)))


@pytest.mark.parametrize(
    "encode, tokenize",
    [(lambda text: [i ^ 1 for i in text.encode()], True), (lambda text: [65] * 9, False)],
)
def test_another_tokenizer_than_the_servers(encode, tokenize, model):
    with StubServer(model, tokenize=tokenize) as server:
        server.encode = encode
        with pytest.raises(ValueError, match="as other tokens than byte does"):
            endpoint(server)


def test_models_by_name(model):
    with StubServer(model, names=["a", "b"]) as server:
        with pytest.raises(ValueError, match="serves a, b: say which with --model"):
            connect(server.url, None, BYTE)
        with pytest.raises(ValueError, match="serves no --model c, but a, b"):
            connect(server.url, "c", BYTE)
        assert connect(server.url + "/v1/completions", "b", BYTE).facts.name == "b"


# ---------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("fault", ["429", "500", "503", "truncated", "reset", "hang"])
def test_faults_that_pass_change_nothing(fault, server, model):
    backend = endpoint(server, timeout=0.25 if fault == "hang" else 60.0)
    server.faults += [fault]
    ours = backend.score_rows(mixed_rows())
    wanted = Local(model, BYTE).score_rows(mixed_rows(), 4096)
    np.testing.assert_allclose(ours.tokens, wanted.tokens, atol=1e-4)
    assert backend.cost()["retries"] >= 1


def test_a_redirect_takes_the_key_nowhere(server, monkeypatch):
    backend = endpoint(server)
    server.faults += ["redirect"]
    with pytest.raises(ValueError, match=r"redirects to http://elsewhere\.invalid/v1"):
        backend.score_rows(mixed_rows())


def test_a_wrong_key_is_one_line_without_it(model, monkeypatch):
    with StubServer(model, key="right") as server:
        with pytest.raises(ValueError, match=r"wants a key: put it into .*ROSEVAL_API_KEY"):
            endpoint(server)
        monkeypatch.setenv("ROSEVAL_API_KEY", "sk-wrong")
        with pytest.raises(ValueError, match="refuses the key in") as error:
            endpoint(server)
        assert "sk-wrong" not in str(error.value) and "***" in str(error.value)
        monkeypatch.setenv("ROSEVAL_API_KEY", "right")
        endpoint(server)


@pytest.mark.parametrize("status, message", [(500, "boom"), (417, "bad"), (500, "context length")])
def test_a_refused_prompt_at_any_concurrency(status, message, model):
    for concurrency in (1, 3):
        with StubServer(model, refuse="question", refusal=(status, message)) as server:
            backend = endpoint(server, concurrency=concurrency)
            found = list(backend.generate(PROMPTS, Sampling(max_new_tokens=2)))
            finish = {s.prompt_index: s.finish_reason for s in found}
            assert finish.pop(2) == "refused" and "refused" not in finish.values()
            with pytest.raises(ValueError, match=f"refuses every prompt: {status} {message}"):
                list(backend.generate(PROMPTS[2:3] * 2, Sampling(max_new_tokens=2)))
            rows = Continuations([[]], np.array([0]), [np.array(PROMPTS[2])], [[5]])
            with pytest.raises(ValueError, match=f"{status} {message}; no score is written"):
                backend.score_rows(rows)


def test_a_prompt_that_hangs_alone_is_refused(model):
    with StubServer(model) as server:
        backend = endpoint(server, timeout=0.3)
        server.slow = "question"
        found = backend.generate(PROMPTS, Sampling(max_new_tokens=2))
        finish = {s.prompt_index: s.finish_reason for s in found}
        assert finish.pop(2) == "refused" and "refused" not in finish.values()
        assert backend.ran()["refused"] == 1


def test_prompts_beyond_the_context(server):
    backend = endpoint(server)
    found = {s.prompt_index: s for s in backend.generate([[65] * 250, [65] * 300], Sampling(20))}
    assert found[1].finish_reason == "refused" and len(found[0].token_ids) >= 1
    assert server.bodies[-1]["max_tokens"] in (1, 6)


def test_a_server_that_is_gone(model):
    with StubServer(model) as server:
        backend = endpoint(server)
    backend.client.pause = 0.001
    with pytest.raises(OSError, match=r"no connection|broke off"):
        backend.score_rows(mixed_rows())
    with pytest.raises(OSError, match="0 of 4 samples are there"):
        list(backend.generate(PROMPTS, Sampling(2)))


def test_a_server_that_comes_back_with_another_model(model):
    """What it says then is not used; with the same model the run goes on."""
    other = tiny_model("llama", max_position_embeddings=1024, n_layers=1, seed=5)
    for verb in ("rows", "samples"):
        for served, same in ((model, True), (other, False)):
            with StubServer(model) as server:
                backend = endpoint(server, concurrency=1)
                server.faults += [None, None, "reset"]
                server.restarted = served
                if same:
                    use(backend, verb)
                    continue
                with pytest.raises(ValueError, match="another model is served there"):
                    use(backend, verb)
                assert backend.kept == (2 if verb == "samples" else 0)


def test_what_arrived_before_another_model_is_kept_however_late_it_is_looked_at(model, monkeypatch):
    """All answers wait until the last request has failed, as they may on a busy machine."""
    other = tiny_model("llama", max_position_embeddings=1024, n_layers=1, seed=5)

    def late(work, jobs, concurrency):
        done = [(job, work(job)) for job in list(jobs)[:5]]  # the third of them is asked twice
        yield from done

    monkeypatch.setattr("backends.endpoint.in_flight", late)
    with StubServer(model) as server:
        backend = endpoint(server, concurrency=1)
        server.faults += [None, None, "reset"]
        server.restarted = other
        with pytest.raises(ValueError, match="another model is served there"):
            use(backend, "samples")
    assert backend.kept == 2


def use(backend, verb):
    backend.kept = 0
    rows = Continuations([[]], np.zeros(8, int), [np.array([i, 66]) for i in range(8)], [[66]] * 8)
    if verb == "rows":
        return backend.score_rows(rows)
    for _ in backend.generate([[i, 66] for i in range(8)], Sampling(max_new_tokens=12)):
        backend.kept += 1


@pytest.mark.parametrize("storm", [["429", "500"] * 9, ["503", "reset", "truncated"] * 6])
def test_storms_pass(storm, server, model):
    backend = endpoint(server)
    server.faults += storm
    ours = backend.score_rows(mixed_rows())
    wanted = Local(model, BYTE).score_rows(mixed_rows(), 4096)
    np.testing.assert_allclose(ours.tokens, wanted.tokens, atol=1e-4)
    assert not server.faults and 0 < backend.cost()["retries"] <= len(storm)


# ---------------------------------------------------------------------------------------------
# Small parts


def test_addresses():
    for text in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/chat/completions/"):
        assert root_of(text) == "http://h:1"
    assert root_of("https://h/models/a/v1/completions") == "https://h/models/a"
    for text in ("h:1", "ftp://h", "http://"):
        with pytest.raises(ValueError, match="no address like"):
            root_of(text)
    for text in ("http://me:secret@h", "http://h?key=secret", "http://h/#secret"):
        with pytest.raises(ValueError, match="ROSEVAL_API_KEY") as error:
            root_of(text)
        assert "secret" not in str(error.value)


def test_when_to_come_back():
    assert retry_after("3") == 3 and retry_after("0.5") == 0.5 and retry_after("-2") == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and retry_after("soon") is None
    assert retry_after(None) is None and retry_after("nan") is None
    assert retry_after("inf") == retry_after("Fri, 31 Dec 2100 23:59:59 GMT") == 600


@pytest.mark.parametrize(
    "body, said",
    [
        ({"error": {"message": "a b", "code": 400}}, "a b"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"object": "error", "message": "m"}, "m"),
        ({"detail": [{"msg": "x"}]}, "[{'msg': 'x'}]"),
        ("plain\n text", "plain text"),
    ],
)
def test_what_errors_say(body, said):
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    assert message_of(data) == said


def test_in_flight_keeps_what_arrived_and_stops():
    begun, seen = [], []

    def work(job):
        begun.append(job)
        if job == 5:
            raise Refused("five")
        return job * job

    with pytest.raises(Refused, match="five"):
        seen += in_flight(work, range(10_000), 3)
    assert len(begun) < 10_000
    begun.clear()
    found = []
    with pytest.raises(Refused):
        for pair in in_flight(work, range(10_000), 3):
            found.append(pair)
    assert sorted(job for job, _ in found) == sorted({*begun} - {5})
    assert list(in_flight(work, [], 3)) == []
