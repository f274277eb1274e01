"""The tests' end of the conversation: what they hold in the candidate's place, and what ends it.

    conversation = Conversation(Pipe(replies, requests))
    check(conversation.candidate(entry_point))
    conversation.finish()
    conversation.stopped            # None, or the only verdict there is

Once a candidate is gone, late, out of memory or out of form, nothing that the tests do can make a
pass of it. A stop is raised where the tests stand, but may be swallowed there (a bare `except`, a
`finally: return`, another thread), so it is recorded first: every further call fails at once, and
whoever asks for the verdict looks here, not at how the tests ended.
"""

import builtins
import contextlib
import opcode
from types import CodeType
from typing import Any, NoReturn

from sandbox.carrier import Proxy, in_a_module, walk
from sandbox.decoder import Decoder, Opaque
from sandbox.frames import FrameError, Pipe
from sandbox.peer import Peer


class Stop(BaseException):
    """Ends a judgement; no `except Exception` in a test holds it."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Conversation(Peer):
    """With one candidate, about one program.

    stopped: the stop that decides the verdict, once there is one. raised: the candidate's last
    exception that was raised in the tests, and blamed: its words.
    """

    final = (Stop,)

    def __init__(self, pipe: Pipe):
        super().__init__(pipe, {}, strict=True)
        self.stopped: Stop | None = None
        self.raised: BaseException | None = None
        self.blamed, self.loaded, self.named = "", False, frozenset()
        self.scope: dict = {}
        self.calls = 0  # that the tests made

    def candidate(self, name: str) -> Proxy:
        """The candidate's function, for the tests."""
        return Proxy(self, 0, name)

    def stop(self, kind: str, detail: str = "") -> Stop:
        """Record the first stop; what is to be raised."""
        if self.stopped is None:
            self.stopped = Stop(kind, detail)
        return Stop(self.stopped.kind, self.stopped.detail)

    # -- what the tests and the candidate share by name

    def share(self, scope: dict) -> None:
        """Take the classes that the prompt defines: the candidate has them too."""
        self.scope = scope
        kinds = {name: kind for name, kind in scope.items() if isinstance(kind, type)}
        self.classes = {name: kind for name, kind in kinds.items() if not in_a_module(kind)}

    def lend(self, names: frozenset) -> None:
        """Say which classes both have, and give the tests the candidate's globals that they name
        and nobody else has: a second function, say. names: all that the code of the tests names."""
        self.named = names
        missing = tuple(name for name in names if name not in self.scope and name not in _BUILTINS)
        if not (missing or self.classes):
            return
        found = self.ask({}, "names", missing, tuple(self.classes))
        if not isinstance(found, dict):
            raise self.stop("sandbox", "the reply is out of form")
        there = {name: found[name] for name in missing if name in found}
        self.scope |= {name: x for name, x in there.items() if not isinstance(x, Opaque)}

    def find_exception(self, name: str) -> type | None:
        """Tests may define the exceptions that they wait for."""
        kind = super().find_exception(name)
        if kind is None and name.startswith(":"):
            kind = walk(self.scope, name[1:])
        return kind if kind and issubclass(kind, BaseException) else None

    # -- calls

    def ask(self, own: dict[int, Any], *message: Any) -> Any:
        with self.lock:
            if self.stopped:
                raise self.stop("")
            self.calls += 1
            try:
                return super().ask(own, *message)
            except Stop:
                raise
            except FrameError as error:
                raise self.stop("sandbox", f"the tests pass {error}") from None
            except BaseException as error:
                if error is self.raised:
                    raise
                # Half a message may be under way: nobody could tell the next answer from this one.
                raise self.stop("sandbox", f"a call broke off: {error!r}") from None

    def finish(self) -> None:
        """After the tests: wait until calls from other threads are done and the program loaded."""
        with self.lock:
            while not self.loaded and not self.stopped:
                self.refuse(self.read(self.receive(), {}).result)

    def send(self, frame: bytes) -> None:
        # A candidate that is gone may have left its last word: the next receive tells.
        with contextlib.suppress(BrokenPipeError):
            super().send(frame)

    def receive(self) -> bytes:
        try:
            return super().receive()
        except EOFError:
            raise self.stop("crash") from None
        except FrameError as error:
            raise self.stop("sandbox", f"the reply is {error}") from None

    def read(self, frame: bytes, ours: dict[int, Any]) -> Decoder:
        try:
            return super().read(frame, ours)
        except MemoryError:
            raise self.stop("memory", "the reply does not fit the judge's memory") from None
        except Exception as error:  # an edge: whatever the bytes were
            raise self.stop("sandbox", f"the reply is {error}") from None

    def refuse(self, message: Any) -> None:
        """What is no answer to a call: the program is loaded, or something failed."""
        match message:
            case ("ready",) if not self.loaded:
                self.loaded = True
            case ("failure", str(stage), tuple(names), str(text)) if names:
                self.fail(stage, [str(name) for name in names], text)
            case _:
                raise self.stop("sandbox", "the reply is out of form")

    def fail(self, stage: str, names: list[str], text: str) -> NoReturn:
        """The end of a program that did not load, or whose answer could not be sent."""
        detail = f"{names[0]}: {text}" if text else names[0]
        if "MemoryError" in names:
            raise self.stop("memory", detail)
        if stage == "cage":
            raise self.stop("sandbox", text)
        if stage == "syntax":
            raise self.stop("syntax error", detail)
        if stage == "reply" and names[0] == "FrameError":
            raise self.stop("sandbox", f"the reply is {text}")
        raise self.stop("exception", detail)

    def raise_(self, error: BaseException) -> NoReturn:
        """Raise in the tests what was raised in the candidate."""
        try:
            text = str(error)
        except Exception:  # the prompt's own __str__, of attributes that are not there
            text = ""
        detail = f"{type(error).__name__}: {text}" if text else type(error).__name__
        if isinstance(error, MemoryError):
            raise self.stop("memory", detail)
        if isinstance(error, StopIteration) and "StopIteration" not in self.named:
            # It would end the tests' own loops in silence: only tests that name it get it.
            error = type("StopIteration", (Exception,), {})(*error.args)
        self.raised, self.blamed = error, detail
        raise error

    def blame(self, error: BaseException) -> tuple[str, str]:
        """(kind, detail) for an exception that ended the tests."""
        if error is self.raised:
            return "exception", self.blamed
        if isinstance(error, MemoryError):
            return "memory", "in the tests of its answers"
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return "wrong answer" if isinstance(error, AssertionError) else "exception", detail


def names_of(code: CodeType) -> frozenset:
    """What a module's code names and does not itself define: globals, attributes and modules."""
    raw, defined = code.co_code, set()
    if len(code.co_names) < 256:  # else their places take more than one byte
        ops = zip(raw[::2], raw[1::2], strict=True)
        defined = {code.co_names[place] for op, place in ops if op == _STORE_NAME}
    return _all_names(code) - defined


def _all_names(code):
    inner = [_all_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return frozenset(code.co_names).union(*inner)


_STORE_NAME = opcode.opmap["STORE_NAME"]


_BUILTINS = frozenset(dir(builtins))
