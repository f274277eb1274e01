"""Where documents begin, against lists of documents put together by hand."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import formats.tokens
from dataset import build_tokenizer, open_stream
from formats.documents import Mark, document_starts, mark_of, starts_in_rows
from formats.tokens import Source, TokenStream

E = 9
BYTE = build_tokenizer("byte")


def stream_of(ids, cuts=()):
    parts = np.split(np.array(ids, dtype=np.uint16), cuts)
    return TokenStream([Source(f"{i}", part) for i, part in enumerate(parts) if len(part)])


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    opens=st.booleans(),
    ended=st.booleans(),
    block=st.integers(1, 7),
    data=st.data(),
)
def test_starts_are_those_of_the_documents(lengths, opens, ended, block, data):
    """Empty documents, none but one, files and blocks that end anywhere, the last one without its
    end of text."""
    parts = [[E, *[1] * n] if opens else [*[1] * n, E] for n in lengths]
    ids = [i for part in parts for i in part]
    if not ended and not opens and len(ids) > 1 and lengths[-1]:
        ids.pop()
    wanted = np.append(0, np.cumsum([len(part) for part in parts])[:-1]).tolist()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats.tokens, "BLOCK_TOKENS", block)
        assert document_starts(stream_of(ids, cuts), Mark(E, opens)).tolist() == wanted
    T = data.draw(st.integers(1, len(ids)))
    for at in range(len(ids) - T + 1):
        row = np.array([ids[at : at + T]])
        inside = [max(s - at, 0) for s in wanted if s < at + T]
        expected = [max(s for s in inside if s <= j) for j in range(T)]
        assert starts_in_rows(row, Mark(E, opens)).tolist() == [expected]


def test_without_a_mark_all_is_one_document():
    assert document_starts(stream_of([1, 2, 3]), Mark(E, False)).tolist() == [0]


def test_which_token_parts_documents(tmp_path):
    def found(ids, mode="fineweb_npy", **tokens):
        return mark_of(stream_of(ids), types.SimpleNamespace(**tokens), mode)

    eos, both = {"eos_token_id": E}, {"eos_token_id": E, "bos_token_id": 7}
    assert found([E, 1, 2], **eos) == Mark(E, True)  # FineWeb's
    assert found([1, 2, E], **eos) == Mark(E, False)  # Megatron's
    assert found([1, 2], **eos) == Mark(E, False)
    assert found([7, 1, E, 7, 2, E], **both) == Mark(7, True)
    assert found([1, E, 2], **both) == Mark(E, False)
    assert found([7, 1], bos_token_id=7, eos_token_id=None) == Mark(7, True)
    for tokens in ({}, {"bos_token_id": 7, "eos_token_id": None}):
        with pytest.raises(ValueError, match="end-of-text token: name a tokenizer"):
            found([1, 2], **tokens)
    # a text file's first document may be empty: its end of text opens nothing
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "é"}\n{"text": "xy"}\n')
    stream = open_stream("text", tmp_path / "a.jsonl", BYTE)
    mark = mark_of(stream, BYTE, "text")
    assert mark == Mark(256, False) and document_starts(stream, mark).tolist() == [0, 1, 4]
