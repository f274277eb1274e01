"""Text files: whatever the pieces, together they are the file."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import text


def pieces_of(path, may_split=True):
    return [piece for group in text.text_groups(path, may_split) for piece in group]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=100, deadline=None)
@given(content=st.text("ab é\n\r", min_size=1, max_size=200), chunk=st.integers(1, 50))
def test_pieces_are_the_file_and_end_where_it_ends(scratch, content, chunk):
    path = scratch / "x.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", chunk)
        pieces = pieces_of(path)
        assert pieces_of(path, may_split=False) == [(content, len(content.encode()), True)]
    assert "".join(piece for piece, *_ in pieces) == content
    assert [size for _, size, _ in pieces] == [len(piece.encode()) for piece, *_ in pieces]
    assert [ends for *_, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(size > chunk for _, size, ends in pieces if not ends)


def test_groups_are_of_about_the_size_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "GROUP_BYTES", 10)
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{"x" * n}"}}\n' for n in (4, 6, 3, 12)))
    groups = list(text.text_groups(tmp_path / "x.jsonl", True))
    assert [[size for _, size, _ in group] for group in groups] == [[4, 6], [3, 12]]
    assert all(ends for group in groups for *_, ends in group)
