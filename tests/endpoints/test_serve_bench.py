"""scripts/serve_bench.py: its schedule and its numbers on a clock of its own, counted and not
timed; and its requests against the stub on loopback."""

import asyncio
import importlib.util
import json
import math

import numpy as np
import pytest
from builders import ROOT, tiny_model
from stub_server import StubServer

spec = importlib.util.spec_from_file_location("serve_bench", ROOT / "scripts/serve_bench.py")
bench = importlib.util.module_from_spec(spec)
__import__("sys").modules["serve_bench"] = bench
spec.loader.exec_module(bench)


class OwnTime(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to whatever is waited for."""

    def __init__(self):
        super().__init__()
        self.now, select = 0.0, self._selector.select

        def jump(timeout):
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now


def run(asks, due, most=None):
    loop = OwnTime()
    try:
        return loop.run_until_complete(bench.run_load(asks, due, most))
    finally:
        loop.close()


def stub(first, gap, tokens):
    """Answers with so many tokens at known times."""

    async def ask():
        found, loop = bench.Outcome(tokens=(10, tokens)), asyncio.get_running_loop()
        start = loop.time()
        for i in range(tokens):
            await asyncio.sleep(gap if i else first)
            found.arrivals.append(loop.time() - start)
        return found

    return ask


def test_a_closed_loop():
    """Twelve requests of 2 s by three clients."""
    outcomes, seconds = run([stub(0.5, 0.5, 4)] * 12, [0.0] * 12, 3)
    assert seconds == pytest.approx(8)
    found = bench.report(outcomes, seconds, {})
    assert found["completed"] == 12 and found["failed"] == 0
    assert found["request_throughput"] == pytest.approx(1.5)
    assert found["output_throughput"] == pytest.approx(6)
    assert found["total_token_throughput"] == pytest.approx((120 + 48) / 8)
    assert found["max_concurrent_requests"] == 3
    assert found["max_output_tokens_per_s"] in (6, 9)  # a piece at 2.0 is in the next second
    for name, ms in (("ttft", 500), ("tpot", 500), ("itl", 500), ("e2el", 2000)):
        for word in ("mean", "median", "p99"):
            assert found[f"{word}_{name}_ms"] == pytest.approx(ms)
    told = bench.detailed(outcomes)
    assert sorted(told["queue_times"]) == pytest.approx([0] * 3 + [2] * 3 + [4] * 3 + [6] * 3)
    assert told["latencies"] == pytest.approx([2.0] * 12)


def test_requests_come_when_they_are_due():
    """However long the others take."""
    due = bench.offsets(50, 4.0, 1.0, seed=3).tolist()
    outcomes, seconds = run([stub(3.0, 0.1, 2)] * 50, due)
    assert [one.start for one in outcomes] == pytest.approx(due)
    assert seconds == pytest.approx(due[-1] + 3.1) and due[-1] == pytest.approx(12.5)
    assert not any(one.queued for one in outcomes)
    at_once = max(sum(d <= t < d + 3.1 for d in due) for t in due)
    assert bench.report(outcomes, seconds, {})["max_concurrent_requests"] == at_once


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_intervals(burstiness):
    gaps = np.diff(bench.offsets(40_000, 5.0, burstiness, seed=1))
    assert gaps.mean() == pytest.approx(0.2, rel=0.02)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.06)
    assert not bench.offsets(4, math.inf, burstiness, 0).any()


def test_percentiles_and_goodput():
    asks = [stub(0.1 * i, 0.01 * i, 3) for i in range(1, 21)]
    outcomes, seconds = run(asks, [0.0] * 20)

    async def broken():
        raise ValueError("no")

    failed, _ = run([broken], [0.0])
    found = bench.report(outcomes + failed, seconds, {"ttft": 1000, "tpot": 80})
    assert found["completed"] == 20 and found["failed"] == 1
    assert failed[0].error == "ValueError: no"
    ttft = np.arange(1, 21) * 100.0
    for p in (90, 95, 99):
        assert found[f"p{p}_ttft_ms"] == pytest.approx(np.percentile(ttft, p))
        assert found[f"p{p}_tpot_ms"] == pytest.approx(np.percentile(ttft / 10, p))
    assert found["std_ttft_ms"] == pytest.approx(ttft.std())
    assert found["request_goodput"] == pytest.approx(8 / seconds)  # tpot is the narrower one


def test_against_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ROSEVAL_API_KEY", "sk-secret")
    with StubServer(tiny_model("llama", n_layers=1)) as server:
        words = ["--endpoint", server.url, "--num-prompts", "6", "--max-concurrency", "2"]
        words += ["--input-len", "20", "--output-len", "5", "--save-detailed"]
        server.faults += ["429", "truncated"]
        bench.main([*words, "--out", str(tmp_path / "x.json")])
        found = json.loads((tmp_path / "x.json").read_text())
        assert (found["completed"], found["failed"]) == (4, 2)
        assert found["total_input_tokens"] == 80 and found["model_id"] == "tiny"
        assert found["total_output_tokens"] == sum(found["output_lens"]) <= 20
        assert sorted(found["errors"])[-1].startswith("ValueError: the stream broke off")
        assert sorted(found["errors"])[-2].startswith("ValueError: 429")
        body = server.bodies[-1]
        assert body["ignore_eos"] and body["stream"] and len(body["prompt"]) == 20
        assert server.most_under_way <= 2
        assert server.headers[-1]["Authorization"] == "Bearer sk-secret"
        rows = [{"question": "one?"}, {"prompt": "two"}]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
        bench.main([*words[:4], *words[-5:-1], "--prompts", str(tmp_path / "p.jsonl")])
        assert {b["prompt"] for b in server.bodies[-6:]} == {"one?", "two"}
        (tmp_path / "p.txt").write_text("one\u2028line\n\ntwo\n")
        bench.main([*words[:4], *words[-5:-1], "--prompts", str(tmp_path / "p.txt")])
        assert {b["prompt"] for b in server.bodies[-6:]} == {"one\u2028line", "two"}
    out, err = capsys.readouterr()
    assert "4 requests in" in out and "2 of 6 requests failed" in err
    assert "sk-secret" not in out + err + (tmp_path / "x.json").read_text()
    with pytest.raises(ValueError, match=r"--goodput itl:3: like ttft:200"):
        bench.main(["--endpoint", "http://h:1", "--goodput", "itl:3"])
    for out, said in ((tmp_path, "is a directory"), (tmp_path / "x.json/y", "is no directory")):
        with pytest.raises(ValueError, match=f"--out .*{said}"):
            bench.main(["--endpoint", "http://h:1", "--out", str(out)])
    with pytest.raises(ValueError, match="--request-rate must be above 0"):
        bench.main(["--endpoint", "http://h:1", "--request-rate", "0"])
