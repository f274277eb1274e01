"""What the command lines of all scripts share: flags, exit codes, signals, progress.

    @dataclass(frozen=True)
    class Options:                                  # the flags, YAML keys and keywords of a script
        limit: int | None = option(None, "the first so many questions", type=positive_int)

    def main(argv=None):
        p = parser(__doc__)
        add_options(p, Options)
        options = read_options(Options, p.parse_args(argv))

    if __name__ == "__main__":
        cli.run(main)

Exit codes: 0 done; 1 something broke, with its traceback; 2 the input is wrong, said in one line;
130 Ctrl-C; 143 SIGTERM. Under torchrun these are the workers' codes; torchrun itself reports any
failure as 1.
"""

import argparse
import copy
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import installed

import streams
from launcher import launch, rank

if TYPE_CHECKING:
    from tqdm import tqdm

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES |= {name: name for name in DTYPES.values()}
USER_ERRORS = (ValueError, OSError)  # OSError: a file that is not there, a full disk, …
SIGNAL_GRACE = 5.0  # seconds that the main thread has to notice a signal
ENDED_BY_OTHERS = 60.0  # seconds that torchrun has to end a rank whose peers are gone
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
COMPILERS = ("torch._dynamo", "torch._inductor")


# ---------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, from rank 0 alone, and whose --help says defaults that no
    help names. What it returns also has `given`: the names of the options that the command line
    gives, at their default values or others."""

    def add_argument(self, *flags: Any, **how: Any) -> argparse.Action:
        action = super().add_argument(*flags, **how)
        default, said = action.default, action.help or ""
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        plain = isinstance(default, str | int | float) and not isinstance(default, bool)
        if plain and shown not in said and default != argparse.SUPPRESS:
            action.help = f"{said} ({shown.replace('%', '%%')})".strip()
        jobs = isinstance(action, argparse._SubParsersAction)
        if action.type is None and action.nargs != 0 and default != "" and not jobs:
            action.type = filled
        return action

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        values = super().parse_args(args, namespace)
        values.given = self._given(args)
        return values

    def _given(self, args: Any) -> set[str]:
        """What is left where nothing has a default."""
        bare = copy.deepcopy(self)
        bare._defaults = {}
        for action in bare._actions:
            action.default = argparse.SUPPRESS
        return set(vars(argparse.ArgumentParser.parse_args(bare, args)))

    def error(self, message: str) -> NoReturn:
        if rank() == 0:
            print(f"error: {printable(message)} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def parser(description: str | None) -> Parser:
    return Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def filled(text: str) -> str:
    """Text, not what a shell makes of a variable that is not set: a path would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a value, or leave it out")
    return text


def positive_int(text: str) -> int:
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"needs a positive whole number, not {text!r}")
    return value


def shards(text: str) -> int | str:
    """A number of processes, or auto."""
    return text if text == "auto" else positive_int(text)


def option(default: Any = MISSING, help: str | None = None, **argument: Any) -> Any:
    """A dataclass field that is also a flag, `--name-of-the-field`. argument: what argparse's
    add_argument takes (type, choices, nargs, metavar, action); without it a bool is a switch."""
    return field(default=default, metadata={"help": help, **argument})


def add_options(p: argparse.ArgumentParser, *kinds: Any) -> None:
    """A flag for each option of dataclasses (or of instances, whose values are the defaults). A
    field that is a dataclass stands for its own options."""
    for kind in kinds:
        for f in fields(kind):
            default = getattr(kind, f.name, f.default)
            if is_dataclass(default):
                add_options(p, default)
            elif "help" in f.metadata:
                p.add_argument(
                    flag_of(f.name), dest=f.name, default=default, **_argument(f, default)
                )


def _argument(f, default) -> dict:
    argument = dict(f.metadata)
    if isinstance(default, bool) and not argument.keys() & {"action", "choices", "type"}:
        argument["action"] = "store_true"
    if default is MISSING:
        argument["required"] = True
    return argument


def read_options(kind: Any, values: Any) -> Any:
    """An instance of an options dataclass (or of an instance's, for its defaults) from a mapping or
    an argparse namespace; lists become tuples. ValueError names what it has no option for."""
    given = values if isinstance(values, dict) else vars(values)
    cls, chosen = kind if isinstance(kind, type) else type(kind), {}
    for f in fields(cls):
        default = getattr(kind, f.name, f.default)
        if is_dataclass(default):
            chosen[f.name] = read_options(default, given)
        elif f.name in given:
            value = given[f.name]
            chosen[f.name] = tuple(value) if isinstance(value, list) else value
        elif default is not MISSING:
            chosen[f.name] = default
    return cls(**chosen)


def convert_options(kind: Any, values: dict, where: str) -> dict:
    """Values of a file as the flags of the same names would read them: types, choices, switches,
    one value or several. ValueError naming `where` and the option."""
    known = dict(_option_fields(kind))
    converted = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: there is no option {flag_of(name)}")
        try:
            converted[name] = _convert(known[name], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{where}: {flag_of(name)}: {error}") from None
    return converted


def take_defaults(p: Parser, kinds: Iterable[Any], values: dict, where: str) -> None:
    """Values of a file become the defaults of a parser's flags, of the options dataclasses `kinds`;
    what a command line gives wins. ValueError as convert_options."""
    for name in values:
        if not any(name in option_names(kind) for kind in kinds):
            raise ValueError(
                f"{where}: no flag is called {name!r} (write num_steps for --num-steps)"
            )
    for kind in kinds:
        own = {name: value for name, value in values.items() if name in option_names(kind)}
        p.set_defaults(**convert_options(kind, own, where))
    for action in p._actions:
        action.required = action.required and action.dest not in values


def _option_fields(kind: Any):
    for f in fields(kind):
        default = getattr(kind, f.name, f.default)
        if is_dataclass(default):
            yield from _option_fields(default)
        elif "help" in f.metadata:
            yield f.name, f


def _convert(f, value):
    argument = f.metadata
    if argument.get("nargs") in ("+", "*"):
        items = value if isinstance(value, (list, tuple)) else [value]
        if value == [] and argument["nargs"] == "+":
            raise ValueError("needs a value")
        return tuple(_convert_one(argument, item, f.default) for item in items)
    if isinstance(f.default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"needs true or false, not {value!r}")
        return value
    return None if value is None and f.default is None else _convert_one(argument, value, f.default)


def _convert_one(argument, value, default):
    choices = argument.get("choices")
    if isinstance(value, bool) and ("on" in (choices or ()) or argument.get("const") == "on"):
        value = "on" if value else "off"  # as YAML reads these two words
    if isinstance(value, (bool, list, dict)) or value is None:
        raise ValueError(f"needs one value, not {value!r}")
    kind = argument.get("type", filled if default != "" else str)
    try:
        value = kind(str(value))
    except ValueError:
        raise ValueError(f"needs a number, not {str(value)!r}") from None
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}")
    return value


def option_names(kind: Any) -> list[str]:
    """The options' names, those of nested dataclasses among them."""
    return [name for name, _ in _option_fields(kind)]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class PrecisionOptions:
    """In what precision a model runs."""

    dtype: str | None = option(
        None, "default: bfloat16 on CUDA, else float32", choices=sorted(DTYPES)
    )
    bf16: bool = option(False, "the same as --dtype bfloat16")
    no_amp: bool = option(False, "the same as --dtype float32, TF32 off")

    def resolve(self, device_type: str) -> str:
        """float32, bfloat16 or float16; contradictions are refused."""
        wanted = {}
        if self.dtype:
            wanted[f"--dtype {self.dtype}"] = DTYPES[self.dtype]
        if self.bf16:
            wanted["--bf16"] = "bfloat16"
        if self.no_amp:
            wanted["--no-amp"] = "float32"
        if len(set(wanted.values())) > 1:
            raise ValueError(f"{' and '.join(wanted)} contradict each other: give one of them")
        default = "bfloat16" if device_type == "cuda" else "float32"
        return next(iter(wanted.values()), default)


@dataclass(frozen=True)
class RunOptions:
    """Where and how a job runs: every script that uses a device has these."""

    device: str | None = option(None, "default: cuda where there is one", choices=("cpu", "cuda"))
    timeout: float = option(
        120.0,
        "seconds without progress after which a rank counts as dead and the run ends (120); "
        "torchrun takes up to 30 more to end a rank that is stopped",
        type=float,
    )
    debug: bool = option(False, "show the traceback of input errors")

    def __post_init__(self):
        if not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"--timeout must be a positive number of seconds, not {self.timeout:g}"
            )


def check_unused(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """ValueError for options that are given where nothing would come of them."""
    for name in names:
        if name in args.given:
            raise ValueError(f"{flag_of(name)} goes {why}")


def check_seconds(p: Parser, args: argparse.Namespace, *names: str) -> None:
    """Flags that are None or a number of seconds to wait for: threads cannot wait longer."""
    for name in names:
        seconds = getattr(args, name)
        if seconds is not None and not 0 < seconds <= threading.TIMEOUT_MAX:
            p.error(f"{flag_of(name)} must be a positive number of seconds, not {seconds:g}")


# ---------------------------------------------------------------------------------------------
# Running


def run(main: Callable[[], object]) -> None:
    """Call main() and leave with the exit code that its outcome deserves."""
    _exit_on_signals()
    streams.guard()
    try:
        main()
        sys.stdout.flush()  # here, where a reader that has gone is expected
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except USER_ERRORS as error:
        code = 2
        _report(error)
    except Exception as error:
        code = 1
        said = installed.missing(error)
        if type(error).__module__.startswith(COMPILERS):
            said = f"torch.compile: {first_line(error)}; --compile off goes without"
        if said:
            code = 2
            _report(error, said)
        else:
            _print_traceback(error)
    sys.stdout.flush()
    lost = streams.lost_output()
    if lost and not code:
        code = 2
        _report(OSError(f"standard output: {lost}; part of what was printed is lost"))
    sys.stderr.flush()
    if code and launch().world_size > 1:
        os._exit(code)  # destructors of NCCL would wait for ranks that are still working
    sys.exit(code)


def first_line(error: Exception) -> str:
    """What a library's exception says, in brief: its first line, or its type if it is silent."""
    text = str(error).strip().rpartition("WeightsUnpickler error:")[2]  # torch's advice is before
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return printable(lines[0][:300]) if lines else type(error).__name__


@functools.cache
def note(text: str) -> None:
    """One line of what a user should know and nobody asked, once, from rank 0."""
    if rank() == 0:
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def reason_of(error: Exception) -> str:
    """Why one of many (a checkpoint of a sweep, say) was not done, in one line, while the others go
    on; what nobody foresaw with its type. --debug shows where it came from."""
    _show_traceback(error)
    expected = isinstance(error, USER_ERRORS)
    said = first_line(error) if expected else f"{type(error).__name__}: {first_line(error)}"
    return installed.missing(error) or said


def _report(error: Exception, said: str = "") -> None:
    """One line: what the error says, or `said`. Bad input fails every rank alike, so the others
    leave the word to rank 0, whose exit makes torchrun end them; a rank that failed alone is still
    there to speak."""
    _show_traceback(error)
    prefix = "error"
    if rank():
        time.sleep(2.0)
        prefix = f"error on rank {rank()}"
    text = printable(" ".join((said or str(error)).split())) or type(error).__name__
    print(f"{prefix}: {text}", file=sys.stderr, flush=True)


def _print_traceback(error: Exception) -> None:
    """Each line with the rank. A rank that only lost its connection to another leaves the word to
    that one: torchrun ends it within a moment."""
    if launch().world_size > 1 and any(text in str(error) for text in LOST_CONNECTION):
        time.sleep(ENDED_BY_OTHERS)
    text = "".join(traceback.format_exception(error)).rstrip()
    lines = printable(text, lines=True).split("\n")
    print("\n".join(f"rank {rank()}: {line}" for line in lines), file=sys.stderr)


def _show_traceback(error: Exception) -> None:
    """With --debug."""
    if "--debug" in sys.argv:
        text = "".join(traceback.format_exception(error))
        print(printable(text, lines=True), end="", file=sys.stderr)


def _exit_on_signals() -> None:
    """SIGTERM raises SystemExit(143) in the main thread, as Ctrl-C raises KeyboardInterrupt. A main
    thread blocked in a collective never sees either, so a second thread ends the process then."""

    def stop(signum, frame):
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch():
        signum = 0
        while signum not in (signal.SIGTERM, signal.SIGINT):
            signum = os.read(reader, 1)[0]
        time.sleep(SIGNAL_GRACE)
        os._exit(128 + signum)

    threading.Thread(target=watch, name="signals", daemon=True).start()


# ---------------------------------------------------------------------------------------------
# What a terminal sees


def printable(text: Any, lines: bool = False) -> str:
    """Text of others for a terminal: names, reasons, what a model wrote. In one line, or with
    `lines` in as many as it has; what would steer a terminal, reorder what is read or cannot be
    encoded stands as Python's escape."""
    text = str(text)
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    text = text if lines else "".join(" " if c.isspace() else c for c in text)
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def progress(total: int, desc: str, unit: str = "it") -> "tqdm":
    """A tqdm bar on rank 0, with the time left; silent on other ranks and without a terminal."""
    from tqdm import tqdm

    quiet = rank() != 0 or not sys.stderr.isatty()
    desc = printable(desc)
    return tqdm(total=total, desc=desc, unit=unit, disable=quiet, leave=False, dynamic_ncols=True)
