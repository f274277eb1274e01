"""A server of OpenAI's /v1/completions on loopback around a tiny model: honest, or with one lie.

with StubServer(tiny_model()) as server:             # as vLLM answers
    server.url, server.bodies                        # what it was asked
StubServer(model, lie="constant")                    # LIES: for good
server.faults += ["429", "reset"]                    # FAULTS: of the next completions, one each
"""

import contextlib
import http.server
import json
import math
import socket
import struct
import threading
import time

import torch

from tokenizer import build_tokenizer

LIES = "constant by_id shifted null nan missing ignored_echo number_first only_chosen two_choices"
LIES = (LIES + " other_index prefix_dependent wrong_count").split()
FAULTS = ["429", "500", "503", "truncated", "reset", "hang", "redirect"]
BYTE = build_tokenizer("byte")


class StubServer:
    """owner: who owns the model, as /v1/models says. context: of a prompt and what follows it.
    refuse: a piece of text whose prompts are answered with `refusal` (status, message); slow: one
    whose prompts are answered late. key: that is wanted. keeps_stop, seeds, hot: whether stop
    strings stay, seeds are honoured, and a temperature is. ids: whether prompts may be token ids.
    bos: whether texts get a token before them. by_id: whether tokens are told by their ids, tops:
    of how many of the likeliest. streams: "same", "other" (a text that is not the same), "none"."""

    def __init__(self, model, lie=None, owner="vllm", context=256, **options):
        assert lie is None or lie in LIES, lie
        self.model, self.lie, self.owner, self.context = model, lie, owner, context
        defaults = {"refuse": None, "refusal": (400, "no"), "key": None, "keeps_stop": False}
        defaults |= {"seeds": True, "hot": True, "ids": True, "bos": False, "names": ["tiny"]}
        defaults |= {"slow": None, "tokenize": True, "usage": True, "by_id": True, "tops": 20}
        defaults |= {"streams": "same"}
        assert options.keys() <= defaults.keys(), options
        self.__dict__.update(defaults | options)
        self.lock, self.bodies, self.faults, self.headers = threading.Lock(), [], [], []
        self.connections = []
        self.retry_after, self.hang_seconds, self.dead_after = "0", 0.5, None
        self.under_way = self.most_under_way = 0
        self.restarted = None  # the model that is there after a reset
        self.posts = {"/v1/completions": self.completion, "/v1/chat/completions": self.chat}
        self.gets = {"/v1/models": self.listed}

    def __enter__(self):
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True

            def log_message(self, *args):
                return

            def setup(self):
                super().setup()
                stub.connections.append(self.connection)

            def do_GET(self):
                stub.headers.append(dict(self.headers))
                if self.path not in stub.gets:
                    return self.answer(404, {"detail": "Not Found"})
                self.answer(200, stub.gets[self.path]())

            def do_POST(self):
                stub.headers.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if stub.key and self.headers.get("Authorization") != f"Bearer {stub.key}":
                    given = self.headers.get("Authorization")
                    return self.answer(401, {"error": f"wrong key {given}"})
                if self.path == "/tokenize" and stub.tokenize and "prompt" in body:
                    return self.answer(200, {"tokens": stub.encode(body["prompt"])})
                if self.path not in stub.posts:
                    return self.answer(404, {"detail": "Not Found"})
                with stub.lock:
                    stub.bodies.append(body)
                    stub.under_way += 1
                    stub.most_under_way = max(stub.most_under_way, stub.under_way)
                    fault = stub.faults.pop(0) if stub.faults else None
                    if stub.dead_after is not None and len(stub.bodies) > stub.dead_after:
                        fault = "reset"
                try:
                    self.complete(body, fault)
                finally:
                    with stub.lock:
                        stub.under_way -= 1

            def complete(self, body, fault):
                if fault in ("429", "500", "503"):
                    extra = {"Retry-After": stub.retry_after} if fault == "429" else {}
                    return self.answer(int(fault), {"message": "later"}, **extra)
                if fault == "redirect":
                    return self.answer(307, {}, Location="http://elsewhere.invalid/v1")
                if fault == "reset":
                    stub.model = stub.restarted or stub.model
                    linger = struct.pack("ii", 1, 0)  # closed by a reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    return self.connection.close()
                if fault == "hang":
                    time.sleep(stub.hang_seconds)
                status, found = stub.posts[self.path](body)
                self.answer(status, found, cut=fault == "truncated")

            def answer(self, status, found, cut=False, **headers):
                kind, data = "application/json", json.dumps(found).encode()
                if status == 200 and isinstance(found, dict) and "many" in found:
                    data = json.dumps(found["many"]).encode()  # a list that is no stream
                if isinstance(found, list) and status == 200:
                    kind = "text/event-stream; charset=utf-8"
                    lines = [f"data: {json.dumps(event)}\n\n" for event in found]
                    data = "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"]).encode()
                data = data[: len(data) // 2] if cut else data
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(data)))
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client waited no longer
                    self.close_connection = True

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *about: None  # clients that hang up are expected
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        with self.lock:  # a thread inside torch would abort the interpreter's end
            self.model = None

    def listed(self):
        about = {"object": "model", "owned_by": self.owner, "created": time.time()}
        about["max_model_len"] = self.context
        return {"object": "list", "data": [{"id": name, **about} for name in self.names]}

    # -- The model ----------------------------------------------------------------------------

    def encode(self, text):
        return BYTE.encode(text)

    @torch.no_grad()
    def logprobs(self, ids):
        """[len(ids), V]: after each; kept with the model, since probes ask the same again."""
        with self.lock:
            known = self.model.__dict__.setdefault("known_logprobs", {})
            if tuple(ids) not in known:
                logits = self.model.logits(self.model.hidden(torch.tensor([ids]))[0])
                known[tuple(ids)] = logits.float().log_softmax(-1)
            return known[tuple(ids)]

    def completion(self, body):
        prompt = body["prompt"]
        if isinstance(prompt, str):
            text, prompt = prompt, [256] * self.bos + self.encode(prompt)
        elif not self.ids:
            return 422, {"detail": [{"msg": "a text is needed"}]}
        else:
            text = BYTE.decode(prompt)
        if self.slow and self.slow in text:
            time.sleep(self.hang_seconds)
        if self.refuse and self.refuse in text:
            status, message = self.refusal
            return status, {"error": {"message": message}}
        if len(prompt) + body["max_tokens"] > self.context:
            message = f"maximum context length is {self.context} tokens"
            return 400, {"error": {"message": message, "type": "BadRequestError"}}
        new, finish = self.draw(prompt, body)
        shown = BYTE.decode(new)
        for stop in body.get("stop", ()):
            if stop in shown:
                end = shown.index(stop)
                shown = shown[: end + len(stop) * self.keeps_stop]
                finish = "stop"
        choice = {"index": 0, "text": shown, "finish_reason": finish, "logprobs": None}
        if body.get("logprobs") and self.lie != "ignored_echo":
            given = self.echoed(prompt, new) if body.get("echo") else self.likeliest(prompt, body)
            choice["logprobs"] = given
        wrong = self.lie == "wrong_count" and bool(body.get("echo"))
        usage = {"prompt_tokens": len(prompt) + wrong, "completion_tokens": len(new)}
        if body.get("stream") and self.streams != "none":
            return 200, self.in_pieces(choice, usage, body)
        choices = [choice]
        if self.lie == "two_choices":
            choices = [choice | {"index": 1}, choice]
        if self.lie == "other_index":
            choice["index"] = 1
        return 200, {"choices": choices} | ({"usage": usage} if self.usage else {})

    def in_pieces(self, choice, usage, body):
        text = choice["text"] + "!" * (self.streams == "other")
        parts = [choice | {"text": piece, "finish_reason": None} for piece in text]
        events = [{"choices": [part]} for part in [*parts, choice | {"text": ""}]]
        told = self.usage and body["stream_options"]["include_usage"]
        return [*events, {"choices": [], "usage": usage}] if told else events

    def likeliest(self, prompt, body):
        """Of what may follow a prompt, by ids: those that are asked for, or the highest."""
        logs = self.logprobs(prompt)[-1]
        ids = logs.topk(min(body["logprobs"], self.tops)).indices.tolist()
        if self.by_id and body.get("logprob_token_ids"):
            ids = body["logprob_token_ids"]
        return {"top_logprobs": [{f"token_id:{i}": float(logs[i]) for i in ids}]}

    def chat(self, body):
        """One message between marks, continued."""
        (message,) = body["messages"]
        prompt = f"<{message['role']}>{message['content']}<>"
        status, found = self.completion(body | {"prompt": prompt})
        if status != 200:
            return status, found
        for event in found if isinstance(found, list) else [found]:
            for choice in event["choices"]:
                text = {"content": choice.pop("text")}
                choice["delta" if isinstance(found, list) else "message"] = text
        return 200, found

    def draw(self, prompt, body):
        ids, generator = list(prompt), torch.Generator()
        if self.seeds and "seed" in body:
            generator.manual_seed(body["seed"])
        else:
            generator.seed()
        while len(ids) - len(prompt) < body["max_tokens"]:
            logs = self.logprobs(ids)[-1]
            if body["temperature"] and self.hot:
                shares = (logs / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(shares, 1, generator=generator))
            else:
                token = int(logs.argmax())
            if token == 256 and not body.get("echo"):
                return ids[len(prompt) :], "stop"
            ids.append(token)
        return ids[len(prompt) :], "length"

    def echoed(self, prompt, new):
        ids = [*prompt, *new]
        logs = self.logprobs(ids[:-1])
        values = [None] + [float(logs[i, token]) for i, token in enumerate(ids[1:])]
        tops = [None] + [
            {"best": float(row.max()), f"token_id:{token}": float(row[token])}
            for row, token in zip(logs, ids[1:])
        ]
        if self.lie == "constant":
            values[1:] = [-1.0] * (len(values) - 1)
        if self.lie == "by_id":  # the last value of a token stands wherever the token does
            last = {token: value for token, value in zip(ids, values)}
            values = [None] + [last[token] for token in ids[1:]]
        if self.lie == "shifted":  # of the tokens' neighbours
            values = [None, *values[2:], values[-1]]
        if self.lie == "prefix_dependent":
            values = [None] + [value - 0.05 * len(ids) for value in values[1:]]
        if self.lie == "null":
            values[len(values) // 2] = None
        if self.lie == "nan":
            values[len(values) // 2] = math.nan
        if self.lie == "number_first":
            values[0] = -2.0
        if self.lie == "missing":
            values, tops = values[:-1], tops[:-1]
        if self.lie == "only_chosen":
            tops = [None] + [{"x": value} for value in values[1:]]
        return {
            "token_logprobs": values,
            "top_logprobs": tops,
            "tokens": [BYTE.decode([token]) for token in ids[: len(values)]],
        }
