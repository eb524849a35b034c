"""Which samples go into one row together, so that rows hold samples instead of padding."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pack_samples(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Distribute samples over as few packs of at most ``seq_len`` tokens as first-fit decreasing finds.

    The samples, longest first, go each into the first pack that has room for it (Johnson 1973, "Near-optimal bin
    packing algorithms"). That takes at most 11/9 * OPT + 6/9 packs, where OPT is the fewest possible (Dósa 2007), and
    rarely 1 % more than OPT where samples are short beside ``seq_len``. The first fit is looked up in a tree over the
    packs' free room, so n samples take O(n log n) time: 100 000 take about half a second.

    Args:
        lengths: Tokens of each sample.
        seq_len: Most tokens of a pack.

    Returns:
        For each pack the indices into ``lengths``, in the order in which they were put there: longest first, and of
        equals the one that comes first. The same lengths always give the same packs.

    Raises:
        ValueError: If a sample is empty or longer than ``seq_len``.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= seq_len:
            raise ValueError(
                f"sample {index} has {length} tokens, but a pack takes samples of 1 to seq_len={seq_len} tokens; cut "
                "it, leave it out or raise seq_len"
            )
    # Two packs together hold more than seq_len, or the later one's samples would have gone into the earlier.
    most_packs = max(1, math.ceil(2 * sum(lengths) / seq_len))
    # A complete binary tree: node i has the children 2 * i and 2 * i + 1, the last `leaves` nodes are the packs, and
    # each node knows the largest room below it.
    leaves = 1 << (most_packs - 1).bit_length()
    room = [seq_len] * (2 * leaves)
    packs: list[list[int]] = [[] for _ in range(most_packs)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < lengths[index]
        packs[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [pack for pack in packs if pack]
