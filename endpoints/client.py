"""Requests to a model's server: a pool of connections, what is asked again, what an error says.

    client = Client("http://host:8000", concurrency=32)
    answer = client.ask("POST", "/v1/completions", {...})           # the JSON of an answer
    pieces = client.stream("/v1/completions", {...})                # [(seconds, JSON of an event)]
    for job, answer in in_flight(ask, jobs, concurrency=32): ...    # as they come, in any order

Whether an error passes is told by its status and its text together: servers send permanent ones as
417, 422 and 500 too. Redirects are not followed, since a key would travel with them; proxies of the
environment are not used. The key comes from ROSEVAL_API_KEY alone and stands in no message.
"""

import datetime
import email.utils
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import cli
from endpoints.timing import Timing, timed

Job = TypeVar("Job")
Answer = TypeVar("Answer")

KEY = "ROSEVAL_API_KEY"
TRIES = 8  # of one request; with PAUSE doubling up to LONGEST_PAUSE, a minute or so
TIMEOUT_TRIES = 2  # ... where each costs as long as an answer may take
SAME_ERRORS = 3  # equal 5xx in a row, while another request is answered: this one's own fault
TOO_SLOW = "no answer within"
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
LONGEST_RETRY_AFTER = 600.0  # seconds that a server may ask for
CONNECT_SECONDS = 20.0
MOST_BYTES = 256 << 20  # of an answer; that a whole vocabulary is named in has a few millions
AWAY = ("no connection", "the connection broke off")
NO_HOST = "no such host"
CUT_SHORT = "an answer that is no JSON, cut short perhaps"
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# what permanent errors say that come with a status of PASSING, in small letters
PERMANENT_WORDS = (
    "context length",
    "context_length_exceeded",
    "exceed_context_size",
    "max_req_total_len",
    "input prompt token len",
    "must have less than",
    "no echo is supported",
    "logits_all",
)


class Refused(Exception):
    """The server will not answer this request, whenever it is asked."""


class Gone(OSError):
    """The server does not answer any more."""


class Failed(Exception):
    """An answer that began well, and did not end well."""


class Client:
    """See the file's docstring. url: the server's address, with or without /v1 and what follows.
    ValueError for an address that is none, or that holds a secret."""

    def __init__(
        self, url: str, concurrency: int = 1, timeout: float = 600.0, pause: float = PAUSE
    ):
        import urllib3

        self.root, self.pause = root_of(url), pause
        self._key = os.environ.get(KEY, "")
        self._errors = urllib3.exceptions
        self._pool = urllib3.PoolManager(
            num_pools=1,
            maxsize=concurrency + 1,  # whoever reads the answers asks, too
            retries=False,
            timeout=urllib3.Timeout(connect=min(timeout, CONNECT_SECONDS), read=timeout),
        )
        self._lock, self._gone, self._seconds = threading.Lock(), "", timeout
        self.control: tuple[str, dict] | None = None  # path and body that it is known to answer
        self.retries = 0
        self.breaks = 0  # after which another server may have come back than was there before
        self.timings: list[Timing] = []  # of each request that was answered

    def ask(self, method: str, path: str, body: dict | None = None, optional: bool = False) -> Any:
        """The JSON of the answer. Refused: by this request's own fault. Gone: not answered, however
        often it was asked. ValueError: where no request could be answered (the key, the route).
        optional: a route that fails (500) each time is one that is not there."""

        def read(response, start):
            answer = json.loads(b"".join(self._parts(response, start)))
            self.note(timed(time.perf_counter() - start))
            return answer

        return self._until_answered(method, path, body, read, optional)

    def stream(self, path: str, body: dict, ends: Callable[[Any], bool]) -> list[tuple[float, Any]]:
        """(seconds after it was asked for, the JSON of the event) of each event of an answer that
        comes piece by piece; `ends` knows the one that says that it is whole. Who knows which of
        them are tokens notes their times."""

        def read(response, start):
            kind = response.headers.get("Content-Type") or ""
            if not kind.startswith("text/event-stream"):
                raise Refused(f"no stream, but {kind or 'nothing named'}")
            events = []
            for line in lines_of(self._parts(response, start)):
                if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                    events.append((time.perf_counter() - start, json.loads(line[5:])))
                    problem = isinstance(events[-1][1], dict) and events[-1][1].get("error")
                    if problem:
                        raise Failed(f"500 {message_of(json.dumps(problem).encode())}")
            if not any(ends(event) for _, event in events):
                raise Failed("a stream that broke off")
            return events

        return self._until_answered("POST", path, body, read)

    def get(self, path: str) -> Any:
        """The JSON of an optional route; None where there is no such one, or none that answers."""
        try:
            return self.ask("GET", path, optional=True)
        except (Refused, NotThere):
            return None

    def note(self, timing: Timing) -> None:
        """One request more was answered."""
        with self._lock:
            self.timings.append(timing)

    # -- Inside -------------------------------------------------------------------------------

    def _until_answered(
        self,
        method: str,
        path: str,
        body: dict | None,
        read: Callable[[Any, float], Any],
        optional: bool = False,
    ) -> Any:
        said: list[str] = []
        while True:
            start, wait = time.perf_counter(), None
            try:
                response = self._send(method, path, body)
                try:
                    if 200 <= response.status < 300:
                        return read(response, start)
                    trouble = self._trouble(response, start)
                    wait = retry_after(response.headers.get("Retry-After"))
                finally:
                    self._let_go(response)
            except (UnicodeDecodeError, json.JSONDecodeError):
                trouble = CUT_SHORT
            except Failed as error:
                trouble = self._hidden(str(error))
            except self._errors.HTTPError as error:
                trouble = self._name(error)
            if not said and trouble in (AWAY[0], NO_HOST):
                cli.note(f"{self.root}: {trouble}; it is asked again, for a minute or so")
            if trouble.startswith((*AWAY, "503")):
                with self._lock:
                    self.breaks += 1
            said.append(trouble)
            self._give_up_or_go_on(said, optional)
            self._wait(len(said), wait)

    def _send(self, method, path, body):
        headers = {"Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        return self._pool.request(
            method,
            self.root + path,
            body=data,
            headers=headers,
            redirect=False,
            preload_content=False,
        )

    def _parts(self, response, start: float) -> Iterator[bytes]:
        """The bytes of an answer as they come, in time and of a size that can be one."""
        size = 0
        while part := response.read1(1 << 16):
            size += len(part)
            if size > MOST_BYTES:
                raise Refused(f"an answer of more than {MOST_BYTES >> 20} MB")
            if time.perf_counter() - start > self._seconds:  # a little at a time, for ever
                raise Failed(f"{TOO_SLOW} {self._seconds:g} s")
            yield part

    def _let_go(self, response) -> None:
        """Back into the pool where it was read to its end, else closed: what is left of an answer
        belongs to no other."""
        if response.length_remaining or not response.closed:
            response.close()
        response.release_conn()

    def _hidden(self, text: str) -> str:
        """Without the key."""
        return text.replace(self._key, "***") if self._key else text

    def _trouble(self, response, start: float) -> str:
        """What a passing error says; raises for one that does not pass."""
        status, text = response.status, message_of(b"".join(self._parts(response, start)))
        text = self._hidden(f"{status} {text}".strip())
        if 300 <= status < 400:
            to = self._hidden(response.headers.get("Location") or "elsewhere")
            raise ValueError(
                f"{self.root} redirects to {to:.200}: redirects are not followed, give the address "
                "that answers (--endpoint)"
            )
        if status in (401, 403):
            what = "refuses the key in" if self._key else "wants a key: put it into"
            raise ValueError(f"{self.root} {what} the environment's {KEY} ({text})")
        if status == 404:
            raise NotThere(f"{self.root}: no such route or model ({text})")
        lower = text.lower()
        if status not in PASSING or any(words in lower for words in PERMANENT_WORDS):
            raise Refused(text)
        return text

    def _give_up_or_go_on(self, said: list[str], optional: bool) -> None:
        same = said[-SAME_ERRORS:]
        is_same = said[-1].startswith("5") and len(same) == SAME_ERRORS and len({*same}) == 1
        slow = sum(text.startswith(TOO_SLOW) for text in said)
        if optional and is_same and said[-1].startswith("500"):  # not 503, which loading models say
            raise Refused(said[-1])
        if (is_same or slow >= TIMEOUT_TRIES) and self._answers_control():
            raise Refused(said[-1])
        if len(said) >= TRIES or slow >= TIMEOUT_TRIES:
            self._gone = (
                f"{self.root}: {said[-1]} (asked {len(said)} times); is the server up, and this "
                "its address (--endpoint)?"
            )
        if self._gone:
            raise Gone(self._gone)

    def _answers_control(self) -> bool:
        if self.control is None:
            return False
        path, body = self.control
        try:
            response = self._send("POST", path, body)
            self._let_go(response)
            return response.status == 200
        except self._errors.HTTPError:
            return False

    def _wait(self, n_failed: int, asked_for: float | None) -> None:
        """Exponential, with jitter, so that those who failed together do not come back together."""
        own = min(self.pause * 2 ** (n_failed - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        with self._lock:
            self.retries += 1
        time.sleep(own if asked_for is None else asked_for + own / 4)

    def _name(self, error) -> str:
        errors = self._errors
        if isinstance(error, errors.SSLError):
            raise ValueError(f"{self.root}: TLS fails: {error!s:.200}") from None
        if isinstance(error, errors.NameResolutionError):
            return NO_HOST
        if isinstance(error, errors.NewConnectionError):
            return AWAY[0]
        if isinstance(error, errors.TimeoutError):
            return f"{TOO_SLOW} {self._seconds:g} s"
        return AWAY[1]


class NotThere(ValueError):
    """404: a route that a server may lack, or a model that it does not serve."""


def root_of(url: str) -> str:
    """scheme://host[:port][/path] below which /v1 lies."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--endpoint {url.split('@')[-1]!r:.200}: no address like http://host:8000"
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"--endpoint: an address without names, keys or ?…: the key goes into {KEY}"
        )
    path = parts.path.rstrip("/")
    for end in ("/completions", "/chat", "/v1"):
        path = path.removesuffix(end)
    return f"{parts.scheme}://{parts.netloc}{path}"


def message_of(data: bytes) -> str:
    """What the body of an error says, in one line: {"error": {"message"}}, {"error"}, {"message"},
    {"detail"}, or text."""
    text = data.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = text
    for _ in range(2):
        if isinstance(found, dict):
            names = [name for name in ("error", "message", "detail") if found.get(name)]
            found = found[names[0]] if names else text
    return " ".join(str(found).split())[:300]


def lines_of(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of bytes that come in parts, without their ends, each as soon as it is whole."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.rstrip(b"\r") for line in lines)
    if rest:
        yield rest


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After asks for, a number or a date; None without one."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if seconds == seconds else None


# ---------------------------------------------------------------------------------------------
# Several requests at a time

END: Any = object()


def in_flight(
    work: Callable[[Job], Answer], jobs: Iterable[Job], concurrency: int
) -> Iterator[tuple[Job, Answer]]:
    """(job, work(job)) as they are done, so many at a time. After an error of `work` no job is
    begun; those under way are still yielded, then it is raised. The threads are daemons: whoever
    stops waits for no answer."""
    jobs = list(jobs)
    lock, done, waiting, stop = threading.Lock(), queue.SimpleQueue(), iter(jobs), threading.Event()

    def run() -> None:
        while not stop.is_set():
            with lock:
                job = next(waiting, END)
            if job is END:
                break
            try:
                done.put((job, work(job), None))
            except Exception as error:  # raised where the answers are used
                stop.set()
                done.put((job, None, error))
        done.put(END)

    left, problem = min(concurrency, len(jobs)), None
    for _ in range(left):
        threading.Thread(target=run, name="request", daemon=True).start()
    try:
        while left:
            item = done.get()
            if item is END:
                left -= 1
            elif item[2] is not None:
                problem = problem or item[2]
            else:
                yield item[:2]
    finally:
        stop.set()
    if problem is not None:
        raise problem
