"""What servers of others said, and a tokenizer's answers, so that they can be asked without them.

with Recorder(url) as proxy: ...; proxy.said               # between a client and a server
with Replayer(said) as server: server.url      # the same answers to the same questions
RecordedTokenizer(real=tokenizer), RecordedTokenizer(said=…)
"""

import contextlib
import http.server
import json
import threading
import urllib.error
import urllib.request
from collections import defaultdict

import numpy as np

ATTRIBUTES = ("name", "vocab_size", "bos_token_id", "eos_token_id", "fingerprint")
MOST_NAMED = 200


class Loopback:
    """A server of this process: answer(method, path, body) -> (status, content type, bytes)."""

    def answer(self, method, path, body):
        raise NotImplementedError

    def __enter__(self):
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True

            def log_message(self, *args):
                return

            def do_GET(self):
                self.reply("GET", "")

            def do_POST(self):
                self.reply("POST", self.rfile.read(int(self.headers["Content-Length"])).decode())

            def reply(self, method, body):
                status, kind, data = stub.answer(method, self.path, body)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


class Recorder(Loopback):
    """Passes on what it is asked, and keeps [method, path, body, status, content type, answer].
    Of a whole vocabulary named, those of `ids` are kept and the likeliest."""

    def __init__(self, url, ids):
        self.to, self.ids, self.said = url, ids, []

    def answer(self, method, path, body):
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(
            self.to + path, body.encode() if method == "POST" else None, headers
        )
        try:
            reply = urllib.request.urlopen(asked)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            status, kind, data = reply.status, reply.headers.get("Content-Type"), reply.read()
        data = self.shortened(data)
        self.said.append([method, path, body, status, kind, data.decode()])
        return status, kind, data

    def shortened(self, data):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(data)
            for place in found["completion_probabilities"]:
                named = place["top_logprobs"]
                if len(named) > MOST_NAMED:
                    kept = [one for i, one in enumerate(named) if i < 20 or one["id"] in self.ids]
                    place["top_logprobs"] = kept
                    data = json.dumps(found).encode()
        return data


class Replayer(Loopback):
    """Answers a question as it was answered, and one that was asked often in the order of then.
    unknown: questions that were not."""

    def __init__(self, said):
        self.lock, self.known, self.unknown = threading.Lock(), defaultdict(list), []
        for method, path, body, *answer in said:
            self.known[method, path, self.meant(body)].append(answer)

    @staticmethod
    def meant(body):
        return json.dumps(json.loads(body), sort_keys=True) if body else ""

    def answer(self, method, path, body):
        key = method, path, self.meant(body)
        with self.lock:
            answers = self.known.get(key)
            if not answers:
                self.unknown.append(key)
                return 418, "text/plain", b"nobody asked this"
            status, kind, text = answers.pop(0) if len(answers) > 1 else answers[0]
        return status, kind, text.encode()


class RecordedTokenizer:
    """A real one that keeps what it said, or one that says it again."""

    def __init__(self, real=None, said=None):
        self.real = real
        own = {name: getattr(real, name, None) for name in ATTRIBUTES} | {"name": "recorded"}
        self.said = said or {"attributes": own}
        self.__dict__.update(self.said["attributes"])

    def _call(self, name, *arguments):
        key = f"{name} {json.dumps(arguments)}"
        if self.real is not None:
            found = getattr(self.real, name)(*arguments)
            self.said[key] = json.loads(json.dumps(found, default=np.ndarray.tolist))
        return self.said[key]

    def encode(self, text):
        return self._call("encode", text)

    def decode(self, ids):
        return self._call("decode", list(map(int, ids)))

    def encode_batch(self, texts, specials=False):
        return [np.array(ids, int) for ids in self._call("encode_batch", texts, specials)]
