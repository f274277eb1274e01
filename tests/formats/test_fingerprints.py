"""formats/fingerprints.py: a large file's digest is that of its pieces' digests, a small one's is
its own."""

import hashlib

import pytest

from formats import fingerprints


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 250, 1000])
def test_a_file_is_hashed_in_pieces(size, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "PIECE", 100)
    monkeypatch.setattr(fingerprints, "BLOCK", 30)
    content = bytes(i * 7 % 256 for i in range(size))
    path = tmp_path / "weights"
    path.write_bytes(content)
    pieces = [content[i : i + 100] for i in range(0, size, 100)]
    wanted = hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces))
    if size <= 100:
        wanted = hashlib.sha256(content)
    assert fingerprints.sha256_of_pieces(path) == wanted.hexdigest()


def test_digests_of_both_kinds_are_remembered_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "PIECE", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(bytes(300))
    kinds = fingerprints.sha256, fingerprints.sha256_of_pieces
    first = [fingerprints.remembered(kind, path) for kind in kinds]
    assert first == [kind(path) for kind in kinds] and first[0] != first[1]
    assert [fingerprints.remembered(kind, path) for kind in kinds] == first
    path.write_bytes(bytes(299) + b"x")
    assert fingerprints.remembered(fingerprints.sha256_of_pieces, path) == kinds[1](path)
