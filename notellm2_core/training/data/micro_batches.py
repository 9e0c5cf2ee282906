"""Divides a global batch into the micro-batches of all data-parallel ranks.

Each rank has the same number of notes and about the same number of tokens, so that none waits long for another. Notes
are dealt like cards, from the longest to the shortest, in snake order (0, 1, 1, 0, ...). A micro-batch is limited by
its tokens, because they, not the notes, decide how much memory it takes.

Shapes: N notes of a global batch, R ranks, K micro-batches of a rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notellm2_core.config.methods import InputKind
from notellm2_core.notes.processor import NoteBatch
from notellm2_core.runtime.prefetch import Prefetcher
from notellm2_core.training.data.dataset import PairDataset


def plan(num_tokens: np.ndarray, num_ranks: int, max_tokens: int | None = None) -> list[list[np.ndarray]]:
    """[R][K] positions in the batch: what each rank embeds, micro-batch by micro-batch.

    K is the smallest number for which no micro-batch has more tokens than `max_tokens`, or than the longest note if
    that has more. It is the same on every rank, and every rank computes the same plan.

    Worked example: notes of 5, 1, 4 and 2 tokens on two ranks. In the order 5, 4, 2, 1 they go to ranks 0, 1, 1, 0: 6
    tokens each.

    Args:
        num_tokens: [N] tokens of each note.
        max_tokens: per micro-batch; None: one micro-batch (K = 1).

    Raises ValueError if N is not a multiple of R.
    """
    if len(num_tokens) % num_ranks:
        raise ValueError(f"{len(num_tokens)} notes cannot be divided evenly among {num_ranks} ranks")
    shares = _deal(np.arange(len(num_tokens)), num_tokens, num_ranks)
    if max_tokens is None:
        return [[share] for share in shares]
    limit = max(int(max_tokens), int(num_tokens.max(initial=0)))
    num_notes = len(num_tokens) // num_ranks
    lower_bound = -(-max(int(num_tokens[share].sum()) for share in shares) // limit)
    for num in range(max(1, lower_bound), num_notes + 1):
        ranks = [_deal(share, num_tokens, num) for share in shares]
        if all(num_tokens[micro].sum() <= limit for micro_batches in ranks for micro in micro_batches):
            return ranks
    raise AssertionError("one note at a time always fits")


def _deal(positions: np.ndarray, num_tokens: np.ndarray, num_hands: int) -> list[np.ndarray]:
    """`positions` in `num_hands` arrays of similar size, each with its longest notes first."""
    order = positions[np.lexsort((positions, -num_tokens[positions]))]
    hands = np.fromiter(_snake_order(num_hands, len(order)), np.int64, len(order))
    return [order[hands == hand] for hand in range(num_hands)]


def _snake_order(num_hands: int, num_cards: int) -> Iterator[int]:
    for card in range(num_cards):
        lap, hand = divmod(card, num_hands)
        yield num_hands - 1 - hand if lap % 2 else hand


@dataclass
class Share:
    """The notes of a batch that one rank embeds."""

    notes: np.ndarray  # [N] the whole batch
    batch_order: Tensor  # [N] row of each note of the batch in the gathered embeddings of all ranks
    num_tokens: int  # of the whole batch, summed over the kinds of input
    num_squares: int  # sum of its notes' squared lengths, likewise
    padding: float  # share of this rank's positions that would be padding if its micro-batches were padded
    micro_batch_notes: list[np.ndarray]  # [K]
    _make: Callable[[np.ndarray], NoteBatch]
    _only: NoteBatch | None  # if K = 1: that micro-batch is used once, so it can be made ahead of its step
    seconds_waited: float = 0.0  # for micro-batches, over all passes

    def micro_batches(self) -> Iterator[NoteBatch]:
        """The micro-batches, on the device; the next one is prefetched."""
        if self._only is not None:
            yield self._only
            return
        batches = Prefetcher(map(self._make, self.micro_batch_notes))
        for batch in batches:
            self.seconds_waited += batches.seconds_waited
            yield batch


def share_out(
    data: PairDataset,
    notes: np.ndarray,
    inputs: Sequence[InputKind],
    max_tokens: int | None,
    device: torch.device,
) -> Share:
    """This rank's share of a global batch of `notes` [N]."""
    lengths = np.stack([data.num_tokens(notes, [kind]) for kind in inputs])  # [I, N]
    num_tokens = lengths.sum(axis=0)
    ranks = plan(num_tokens, dist.get_world_size(), max_tokens)
    gathered = np.concatenate([micro for micro_batches in ranks for micro in micro_batches])
    own = ranks[dist.get_rank()]
    batch_order = torch.from_numpy(np.argsort(gathered)).to(device)
    num_real = sum(int(num_tokens[micro].sum()) for micro in own)
    padding = 1 - num_real / sum(lengths[:, micro].size * int(lengths[:, micro].max()) for micro in own)

    def make(micro_notes: np.ndarray) -> NoteBatch:
        return data.note_batch(micro_notes, inputs).to(device)

    micro_batch_notes = [notes[micro] for micro in own]
    only = make(micro_batch_notes[0]) if len(micro_batch_notes) == 1 else None
    squares = int(np.square(lengths).sum())
    return Share(notes, batch_order, int(num_tokens.sum()), squares, padding, micro_batch_notes, make, only)
