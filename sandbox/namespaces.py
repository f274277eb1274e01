"""What imports need of the file system, and tier A's namespaces around it.

The tree of the interpreter is the same in all tiers: A binds it here, bubblewrap is told of it, and
Landlock allows it. Standard library only, as jail.py runs by itself.
"""

import collections
import ctypes
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location

from sandbox import linux
from sandbox.linux import check, libc

SCRATCH = "/tmp/scratch"  # the only writable directory of tiers A and B
SCRATCH_BYTES = 16 << 20
_NEWNS, _NEWUTS, _NEWIPC = 0x20000, 0x4000000, 0x8000000
_NEWUSER, NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, NOSUID, NODEV, NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _REC, _PRIVATE, _RELATIME = 1 << 12, 1 << 14, 1 << 18, 1 << 21
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

Tree = collections.namedtuple("Tree", "bound hidden packages readable listable")


def interpreter_tree(packages: dict[str, str]) -> Tree:
    """The paths that a candidate's imports need: the library, shared libraries, named packages.

    Nothing else of site-packages: it may hold a benchmark's answers or lead to a user's project.
    packages: where each of them lies, by name. `bound` is to be mounted, with `hidden` under it
    covered and `packages` put back; `readable` and `listable` say the same to Landlock, which
    cannot cover.
    """
    stdlib, lib = os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib")
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    # Debian's shared libraries of linear algebra are links by way of /etc/alternatives.
    system += ["/etc/alternatives", "/usr/share/zoneinfo"]
    system = [path for path in system if os.path.exists(path)]
    hidden = [f"{stdlib}/{name}" for name in ("site-packages", "dist-packages")]
    own = [entry.path for entry in os.scandir(stdlib) if entry.path not in hidden]
    if os.path.isdir(lib):
        own += [entry.path for entry in os.scandir(lib) if ".so" in entry.name]
    paths = list(packages.values())
    paths += [libs for path in paths if os.path.isdir(libs := path + ".libs")]
    return Tree(
        bound=[*system, *([lib] if os.path.isdir(lib) else []), stdlib],
        hidden=[path for path in hidden if os.path.isdir(path)],
        packages=paths,
        readable=[*system, *own, *paths, *DEVICES],
        listable=[stdlib],
    )


class Packages:
    """Finds the named packages where they lie, and nothing beside them: all others look like what
    is not installed, and no directory of theirs need be on sys.path. paths: by name."""

    def __init__(self, paths: dict[str, str]):
        self.paths = dict(paths)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As importlib asks for it."""
        place = self.paths.get(name)
        if path is not None or place is None:
            return None
        if not os.path.isdir(place):
            return spec_from_file_location(name, place)
        if os.path.exists(start := f"{place}/__init__.py"):
            return spec_from_file_location(name, start, submodule_search_locations=[place])
        spec = ModuleSpec(name, None, is_package=True)  # a namespace
        spec.submodule_search_locations = [place]
        return spec


def keep_reachable(first: int, packages: Packages | None = None) -> int:
    """Name import directories by open descriptors, from `first` on: root's home is closed to the
    uid that we become. Returns the first descriptor after them."""
    moved = {}
    folders = [path for path in sys.path if os.path.isdir(path)]
    folders += [os.path.dirname(path) for path in packages.paths.values()] if packages else []
    for path in dict.fromkeys(folders):
        fd = linux.park(os.open(path, os.O_PATH | os.O_DIRECTORY))
        os.dup2(fd, first + len(moved))
        os.close(fd)
        moved[path] = f"/proc/self/fd/{first + len(moved)}"

    def by_descriptor(path):
        over = [old for old in moved if path == old or path.startswith(old + "/")]
        old = max(over, key=len, default="")
        return moved[old] + path[len(old) :] if over else path

    sys.path[:] = map(by_descriptor, sys.path)
    if packages:
        packages.paths = {name: by_descriptor(path) for name, path in packages.paths.items()}
    for package in [m for m in sys.modules.values() if hasattr(m, "__path__")]:
        package.__path__ = list(map(by_descriptor, package.__path__))
    return first + len(moved)


# ---------------------------------------------------------------------------------------------
# Tier A


def mount(
    source: str | None,
    target: str,
    kind: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """mount(2), for text arguments. Raises SetupError naming the target."""
    raw = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(f"mount {target}", libc.mount(raw[0], raw[1], raw[2], ctypes.c_ulong(flags), raw[3]))


def bind(source: str, root: str) -> None:
    """Bind a path read-only at the same place under `root`."""
    target = root + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    if os.path.ismount(target):
        return
    device = source.startswith("/dev/")
    mount(source, target, flags=_BIND | _REC)
    # Inside a user namespace a remount must keep the flags that the source's mount has.
    kept = os.statvfs(target).f_flag & (0xF | 0x400 | 0x800)
    kept |= _RELATIME if os.statvfs(target).f_flag & 0x1000 else 0
    flags = kept | NOSUID | (0 if device else NODEV | _RDONLY) | _BIND | _REMOUNT
    mount(None, target, flags=flags)


def build_root(tree: Tree) -> None:
    """Make a small read-only tree of the interpreter our root; the old root is gone after it."""
    mount(None, "/", flags=_REC | _PRIVATE)
    root = "/proc"  # exists everywhere and holds nothing that we bind
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=4m,mode=0755")
    for path in sorted({*tree.bound, *DEVICES}):
        bind(path, root)
    for path in tree.hidden:
        mount("tmpfs", root + path, "tmpfs", NOSUID | NODEV, "size=1m,mode=0755")
    for path in tree.packages:
        bind(path, root)
    os.makedirs(root + SCRATCH)
    os.chdir(root)
    mount(None, root, flags=_REMOUNT | _BIND | _RDONLY | NOSUID | NODEV)
    check("pivot_root", libc.pivot_root(b".", b"."))
    check("umount of the old root", libc.umount2(b".", 2))
    os.chdir("/")


def enter_user_namespace(flags: int, proc: int) -> None:
    """Unshare a user namespace (and `flags`) in which this very uid and gid are the only ones.
    proc: a descriptor of /proc."""
    uid, gid = os.geteuid(), os.getegid()
    libc.prctl(linux.SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self belongs to root after a setuid
    check("unshare user namespace", libc.unshare(_NEWUSER | flags))
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, text in maps.items():
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        except OSError as e:
            raise linux.SetupError(f"write {name}: {e.strerror}") from None
        finally:
            os.close(fd)


def enter_namespaces(tree: Tree, spare: int | None, proc: int) -> int:
    """Tier A: put the zygote into its namespaces; returns in their first process (PID 1), with a
    descriptor of its PID namespace. spare: the id to become, of root."""
    # Root can bind an interpreter that the uid it drops to could not reach, if it may mount at all.
    if spare is not None and libc.unshare(_NEWNS) < 0:
        linux.become(spare)
        spare = None
    if spare is None:
        enter_user_namespace(_NEWNS, proc)
    build_root(tree)
    rest = NEWPID | _NEWIPC | _NEWUTS | _NEWNET
    if spare is not None:
        linux.become(spare)
        enter_user_namespace(_NEWNS | rest, proc)
    else:
        check("unshare PID, IPC, UTS, network namespaces", libc.unshare(rest))
    child = os.fork()
    if child:
        linux.die_with_parent()
        os.close(0)
        os.waitpid(child, 0)
        os._exit(0)
    linux.die_with_parent()
    return os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)
