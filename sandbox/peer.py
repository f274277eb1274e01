"""The two ends of the conversation between the tests and a candidate: calls and their results.

    peer = Peer(pipe, classes)
    peer.call(0, ([3, 1, 2],), {})     # the other end's first function, from here

Both ends are this one class; the tests' (proxy.py) trusts nothing that it hears. While one waits
for its call's result it serves the other's calls, so a function may be an argument or a result.

Beyond what things are worth (frames.py, carrier.py) it keeps which are one and the same: an
argument that comes back is the caller's own object, a mutable one with the changes that the call
made. What the function still holds after its call (a memo, a default argument) is brought to its
present state with every later call, on both ends.
"""

import _thread
import sys
from typing import Any

from sandbox.carrier import Carrier
from sandbox.decoder import MAX_MEMORY, Decoder
from sandbox.frames import COUNT, MUTABLE, Encoder, FrameError, Own, Pipe, encode_scalars

ARGUMENT = 1 << 30  # numbers from here on are of arguments by their place, whatever they are
KEPT = 1 << 31  # and from here on of containers that a call left in both ends' hands
MOST_SHARED = 64
_CONTAINERS = tuple(MUTABLE)


class Peer(Carrier):
    """One end."""

    final: tuple = ()  # exceptions that end the conversation and do not cross

    def __init__(self, pipe: Pipe, classes: dict, strict: bool = False):
        super().__init__(classes, strict)
        self.pipe, self.lock = pipe, _thread.RLock()
        self.kept: dict[int, Any] = {}  # containers that both ends hold, between calls
        self.kept_ids: dict[int, int] = {}
        self.held = 0

    def call(self, number: int, args: tuple, kwargs: dict) -> Any:
        """Call the other end's function, return its result or raise its exception."""
        own = {ARGUMENT + i: arg for i, arg in enumerate((*args, *kwargs.values()))}
        return self.ask(own, "call", number, args, tuple(kwargs.items()), self.shared())

    def ask(self, own: dict[int, Any], *message: Any) -> Any:
        """Send a message; what the other end answers. own: what the answer may refer to."""
        with self.lock:
            encoder = Encoder(self.strict, self, self.kept_ids)
            self.send(self.frame_of(encoder, message))
            return self.answer(own | dict(enumerate(encoder.linked)) | self.kept)

    def frame_of(self, encoder: Encoder, message: tuple) -> bytes:
        """A message's bytes: most calls and results need little beside what they carry."""
        match message:
            case ("call", number, args, (), ()):
                scalars, head = encode_scalars(args), COUNT.pack(number)
                if scalars is not None:
                    return b"!" + head + scalars
                return encoder.frame(args, b"(" + head)
            case ("result", value, None, (), ()):
                return encoder.frame(value, b")" + bytes(4))
        return encoder.frame(message)

    def answer(self, ours: dict[int, Any]) -> Any:
        """The result of our call; meanwhile we serve the other end's."""
        while True:
            frame = self.receive()
            decoder = self.read(frame, ours)
            match decoder.result:
                case ("result", value, _, _, tuple(kept)):
                    for container in kept:
                        self.keep(container, decoder.memory)
                    return value
                case ("raised", BaseException() as error, _, _, ()):
                    self.raise_(error)
                case ("call", int(number), tuple(args), tuple(pairs), _):
                    self.serve(number, args, dict(pairs), frame, decoder.linked)
                case other:
                    self.refuse(other)

    def send(self, frame: bytes) -> None:
        self.pipe.send(frame)

    def receive(self) -> bytes:
        return self.pipe.receive()

    def read(self, frame: bytes, ours: dict[int, Any]) -> Decoder:
        """A decoder that has read all of a frame."""
        decoder = Decoder(frame, self, ours)
        decoder.read()
        return decoder

    def raise_(self, error: BaseException) -> None:
        raise error

    def refuse(self, message: Any) -> None:
        """For a message that is none of ours."""
        raise FrameError("a message out of form")

    def serve(self, number: int, args: tuple, kwargs: dict, frame: bytes, linked: list) -> None:
        """Call a function of ours for the other end and send what came of it."""
        if not 0 <= number < len(self.functions):
            return self.refuse("a function that is not known")
        kept: tuple = ()
        try:
            value, word = self.functions[number](*args, **kwargs), "result"
        except BaseException as error:
            if isinstance(error, self.final):
                raise
            value, word = error, "raised"
        else:
            if frame[:1] == b"!" and not self.kept and (short := _short_reply(value, args)):
                return self.send(short)
            # Referred to from elsewhere than here, the function still holds them.
            for arg in args:
                if sys.getrefcount(arg) > 4 + (arg is value):
                    kept += (arg,)
            if sys.getrefcount(value) > 2 and not any(value is known for known in linked):
                kept += (value,)
            if kept:
                kept = tuple(x for x in kept if self.is_container(x) and id(x) not in self.kept_ids)
        call = number, args, tuple(kwargs.items()), self.shared()
        self.send(self.reply(word, value, kept, call, frame, linked))

    def reply(
        self, word: str, value: Any, kept: tuple, call: tuple, frame: bytes, linked: list
    ) -> bytes:
        """What came of a call. What it changed of its arguments goes back, as the caller may look
        at them, and what it changed of containers that both ends hold from before."""
        changed = bool(linked or self.kept) and frame[:1] != b"!"
        if changed:
            again = Encoder(False, self, self.kept_ids, drain=False)
            changed = self.frame_of(again, ("call", *call)) != frame
        known = {id(container): i for i, container in enumerate(linked)} | self.kept_ids
        encoder = Encoder(self.strict, self, known, fresh=0 if changed else KEPT)
        if call and not (self.is_container(value) or hasattr(value, "__next__")):
            args = *call[1], *(arg for _, arg in call[2])
            places = [ARGUMENT + i for i, arg in enumerate(args) if arg is value]
            value = Own(places[0]) if places else value
        message = word, value, call[1:3] if changed else None, self.shared(), kept
        reply = self.frame_of(encoder, message)
        for container in kept:
            self.keep(container, 0)
        return reply

    def shared(self) -> tuple:
        """Containers that both ends hold, to be brought to what they are here; not for ever more,
        or a function that keeps all that it sees would cost the square of its calls."""
        return tuple(self.kept.values())[:MOST_SHARED] if self.kept else ()

    def keep(self, value: Any, memory: int) -> None:
        """Remember a container that both ends hold: it may come by again, changed."""
        self.held += memory
        if self.held > MAX_MEMORY or not self.is_container(value):
            return self.refuse("too much that is kept")
        number = KEPT + len(self.kept)
        self.kept[number], self.kept_ids[id(value)] = value, number

    def is_container(self, value: Any) -> bool:
        return isinstance(value, _CONTAINERS) or self.is_shared(type(value))


def _short_reply(value, args):
    """The reply of a call of numbers and texts whose result is one, perhaps the very same."""
    for i, arg in enumerate(args):
        if arg is value:
            return b"@" + COUNT.pack(ARGUMENT + i)
    scalar = encode_scalars((value,))
    return None if scalar is None else b"=" + bytes(4) + scalar
