"""Which notes of a global batch are embedded where and when: each rank has as many, and about as many tokens.

Notes are dealt out from the longest to the shortest, there and back again, as cards would be: no rank waits long for
another, and what fits into memory at a time is a number of tokens, not of notes.

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
    """[R][K] places in the batch: what each rank embeds, micro-batch by micro-batch.

    K is the smallest for which no micro-batch has more than `max_tokens` (None: 1), or than the longest note has. It is
    the same on every rank, and every rank computes the same plan.

    Worked example: tokens 5, 1, 4, 2 on two ranks go to ranks 0, 1, 1, 0 in the order 5, 4, 2, 1: 6 tokens each.

    Args:
        num_tokens: [N] of each note; N is a multiple of R.
    """
    if len(num_tokens) % num_ranks:
        raise ValueError(f"{len(num_tokens)} notes cannot be shared out evenly over {num_ranks} ranks")
    shares = _dealt(np.arange(len(num_tokens)), num_tokens, num_ranks)
    if max_tokens is None:
        return [[share] for share in shares]
    most = max(int(max_tokens), int(num_tokens.max(initial=0)))
    num_notes = len(num_tokens) // num_ranks
    fewest = -(-max(int(num_tokens[share].sum()) for share in shares) // most)
    for num in range(max(1, fewest), num_notes + 1):
        dealt = [_dealt(share, num_tokens, num) for share in shares]
        if all(num_tokens[part].sum() <= most for share in dealt for part in share):
            return dealt
    raise AssertionError("one note at a time always fits")


def _dealt(places: np.ndarray, num_tokens: np.ndarray, num_hands: int) -> list[np.ndarray]:
    """The places in `num_hands` parts of like size, the longest notes first in each."""
    order = places[np.lexsort((places, -num_tokens[places]))]
    hands = np.fromiter(_there_and_back(num_hands, len(order)), np.int64, len(order))
    return [order[hands == hand] for hand in range(num_hands)]


def _there_and_back(num_hands: int, num_cards: int) -> Iterator[int]:
    for card in range(num_cards):
        lap, hand = divmod(card, num_hands)
        yield num_hands - 1 - hand if lap % 2 else hand


@dataclass
class Share:
    """What one rank embeds of a batch."""

    rows: np.ndarray  # [N] the batch
    places: Tensor  # [N] where each note of the batch is among the rows of all ranks, one rank after the other
    num_tokens: int  # of the whole batch, once for each kind of input
    num_squares: int  # the sum of its notes' squared lengths, likewise
    padding: float  # what share of this rank's tokens there would be for nothing, if its micro-batches were padded
    parts: list[np.ndarray]  # [K] the notes of each of its micro-batches
    _made: Callable[[np.ndarray], NoteBatch]
    _ready: NoteBatch | None  # the only micro-batch: it is needed once, and can be made ahead
    seconds_waited: float = 0.0  # for its micro-batches, as often as they were asked for

    def micro_batches(self) -> Iterator[NoteBatch]:
        """On the device, one and the next at a time."""
        if self._ready is not None:
            yield self._ready
            return
        batches = Prefetcher(map(self._made, self.parts))
        for batch in batches:
            self.seconds_waited += batches.seconds_waited
            yield batch


def share_out(
    data: PairDataset,
    rows: np.ndarray,
    inputs: Sequence[InputKind],
    max_tokens: int | None,
    device: torch.device,
) -> Share:
    """This rank's share of the notes `rows` [N] of a global batch."""
    lengths = np.stack([data.num_tokens(rows, [kind]) for kind in inputs])  # [I, N]
    num_tokens = lengths.sum(axis=0)
    dealt = plan(num_tokens, dist.get_world_size(), max_tokens)
    order = np.concatenate([part for share in dealt for part in share])
    mine = dealt[dist.get_rank()]
    places = torch.from_numpy(np.argsort(order)).to(device)
    real = sum(int(num_tokens[part].sum()) for part in mine)
    padding = 1 - real / sum(lengths[:, part].size * int(lengths[:, part].max()) for part in mine)

    def made(notes: np.ndarray) -> NoteBatch:
        return data.note_batch(notes, inputs).to(device)

    parts = [rows[part] for part in mine]
    ready = made(parts[0]) if len(parts) == 1 else None
    squares = int(np.square(lengths).sum())
    return Share(rows, places, int(num_tokens.sum()), squares, padding, parts, made, ready)
