"""Programs on their way to a worker: a packet each, so that one is read whole or not at all.

    ours, theirs = packets.pair()
    packets.send(ours, key, text)
    key, text = packets.receive(theirs)     # None: nobody sends any more

Who holds a worker's end beside it may receive as well: of the two, one gets the packet.
"""

import os
import socket
import struct

KEY = 32  # bytes: a program's hash, before its text
MOST = 1 << 14  # bytes in a packet; a longer text is a file that goes with it. No sender waits


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, key: bytes, text: bytes) -> None:
    """Send a text under its key."""
    if len(text) <= MOST:
        to.send(key + text)
        return
    file = os.memfd_create("program")
    try:
        left = memoryview(text)
        while left:
            left = left[os.write(file, left) :]
        os.lseek(file, 0, os.SEEK_SET)
        socket.send_fds(to, [key], [file])
    finally:
        os.close(file)


def receive(end: socket.socket, flags: int = 0) -> tuple[bytes, bytes] | None:
    """(key, text) of the next packet. BlockingIOError if there is none and MSG_DONTWAIT a flag."""
    room = socket.CMSG_SPACE(struct.calcsize("i"))
    packet, beside, _, _ = end.recvmsg(KEY + MOST, room, flags | socket.MSG_CMSG_CLOEXEC)
    if not packet:
        return None
    if not beside:
        return packet[:KEY], packet[KEY:]
    (descriptor,) = struct.unpack("i", beside[0][2])
    with open(descriptor, "rb") as file:
        return packet, file.read()
