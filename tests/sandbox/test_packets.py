"""packets.py: each is read once and whole, by whoever reads first."""

import os
import socket
import threading

import pytest

from sandbox import packets

KEYS = [bytes([i]) * packets.KEY for i in range(8)]


@pytest.mark.parametrize("size", [0, 1, packets.MOST, packets.MOST + 1, 3 << 20])
def test_a_text_of_any_length_arrives(size):
    ours, theirs = packets.pair()
    text = os.urandom(size)
    descriptors = os.listdir("/proc/self/fd")
    packets.send(ours, KEYS[1], text)
    packets.send(ours, KEYS[2], text)  # nobody has read the first
    assert [packets.receive(theirs) for _ in range(2)] == [(KEYS[1], text), (KEYS[2], text)]
    assert os.listdir("/proc/self/fd") == descriptors
    with pytest.raises(BlockingIOError):
        packets.receive(theirs, socket.MSG_DONTWAIT)
    ours.close()
    assert packets.receive(theirs) is None


def test_of_two_that_read_one_gets_it():
    ours, theirs = packets.pair()
    seen: list = []

    def read():
        end = theirs.dup()
        while packet := packets.receive(end):
            seen.append(packet)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    sent = [(key, bytes(i * 9_000)) for i, key in enumerate(KEYS)] * 20
    for key, text in sent:
        packets.send(ours, key, text)
    ours.shutdown(socket.SHUT_WR)
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(sent)
