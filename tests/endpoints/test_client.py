"""endpoints/client.py against answers that never end, in size or in time."""

import socket
import threading
import time

import pytest

from endpoints import client as room
from endpoints.client import Client, Gone, Refused, lines_of

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
EVENTS, JSON = b"text/event-stream", b"application/json"


class Endless:
    """Says `head`, then `part` again and again, `pause` seconds between; sent: bytes in all."""

    def __init__(self, head, part, pause=0.0):
        self.head, self.part, self.pause, self.sent, self.over = head, part, pause, 0, False

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        return self

    def __exit__(self, *exc):
        self.over = True
        self.socket.close()

    def serve(self):
        while not self.over:
            try:
                connection, _ = self.socket.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(self.head)
                    while not self.over:
                        connection.sendall(self.part)
                        self.sent += len(self.part)
                        time.sleep(self.pause)
            except OSError:  # the client left
                continue


@pytest.mark.parametrize("ask", ["ask", "stream"])
@pytest.mark.parametrize("status", [b"200", b"500"])
def test_a_gigabyte_is_not_read(ask, status, monkeypatch):
    monkeypatch.setattr(room, "MOST_BYTES", 4 << 20)
    head = (HEAD % (EVENTS, 1 << 30)).replace(b"200", status)
    with Endless(head, b"x" * (1 << 16)) as server:
        client = Client(server.url)
        with pytest.raises(Refused, match="an answer of more than 4 MB"):
            if ask == "ask":
                client.ask("POST", "/v1/completions", {})
            else:
                client.stream("/v1/completions", {}, bool)
        assert server.sent < 64 << 20


def test_a_little_at_a_time_for_ever_is_no_answer():
    with Endless(HEAD % (JSON, 1 << 20), b" ", pause=0.01) as server:
        client = Client(server.url, timeout=0.3, pause=0.001)
        with pytest.raises(Gone, match=r"no answer within 0\.3 s"):
            client.ask("POST", "/v1/completions", {})


def test_a_server_that_is_not_there_is_waited_for_aloud(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(Gone, match=rf"{url}: no connection .* address \(--endpoint\)\?"):
        Client(url, pause=0.001).ask("GET", "/health")
    said = capsys.readouterr().err
    assert said == f"note: {url}: no connection; it is asked again, for a minute or so\n"


def test_what_is_no_stream():
    with (
        Endless(HEAD % (JSON, 2), b"{}") as server,
        pytest.raises(Refused, match="no stream, but application/json"),
    ):
        Client(server.url).stream("/v1/completions", {}, bool)


def test_lines_come_as_soon_as_they_are_whole():
    seen = []

    def parts():
        for part in (b"a", b"b\r\nc\n", b"", b"\nd", b"e"):
            seen.append(part)
            yield part

    found = [(line, len(seen)) for line in lines_of(parts())]
    assert found == [(b"ab", 2), (b"c", 2), (b"", 4), (b"de", 5)]
