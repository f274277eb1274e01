"""Best-fit packing: documents are cut only where they are longer than a window.

    plan = best_fit(starts, n_tokens, seq_len=1024, seed=42)

A document longer than T is cut into windows of T and a rest. Rests and shorter documents, from the
longest down, each go into the fullest window that has room for them. What room is left is padding.

Reference: Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv 2404.10830).
"""

import numpy as np

from training.packing import NOTHING, PADDING, Plan


def best_fit_bins(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of `sizes` [N], each 1 … capacity, by bin, best-fit-decreasing: in decreasing order,
    those of one size in the order given, each into the fullest bin that has room, of several the
    newest."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room they have
    rooms = 0  # bit r: whether there is a bin that has room r; a shift finds the fullest that fits
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(i)
        if room > size:
            with_room[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return bins


def best_fit(starts: np.ndarray, n_tokens: int, seq_len: int, seed: int) -> Plan:
    """Of documents that begin at `starts` [D] of a stream of n_tokens. Which of several documents
    of one length is taken first is drawn from the seed."""
    ends = np.append(starts[1:], n_tokens)
    n_whole = (ends - starts) // seq_len  # windows that a document fills
    document = np.repeat(np.arange(len(starts)), n_whole)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_whole) - n_whole, n_whole)
    full = starts[document] + nth * seq_len
    after_full = np.where(full + seq_len < ends[document], full + seq_len, NOTHING)

    rests = starts + n_whole * seq_len
    kept = np.flatnonzero(ends > rests)
    kept = kept[np.random.RandomState(seed).permutation(len(kept))]
    rests, sizes = rests[kept], (ends - rests)[kept]
    piece_starts, lengths = [full], [np.full(len(full), seq_len)]
    n_pieces = [np.ones(len(full), dtype=np.int64)]
    for members in best_fit_bins(sizes, seq_len):
        room = seq_len - int(sizes[members].sum())
        filler = [room] if room else []
        piece_starts.append(np.append(rests[members], [PADDING] * len(filler)))
        lengths.append(np.append(sizes[members], filler))
        n_pieces.append(np.array([len(members) + len(filler)]))
    counts = np.concatenate(n_pieces)
    return Plan(
        seq_len,
        np.concatenate(piece_starts).astype(np.int64),
        np.concatenate(lengths).astype(np.int64),
        np.append(0, np.cumsum(counts)),
        np.append(after_full, np.full(len(counts) - len(full), NOTHING)),
    )
