"""Packing: the tokens of all notes in one row without padding.

Notes of similar length stand side by side, so that they can be padded together where attention needs it. The prefix
that all prompts share can be in the row once, because no token depends on later ones.

Shapes: N notes, T tokens of the longest, S tokens of all of them, R tokens in the row (without empty positions).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_MAX_PADDING, _MAX_RATIO = 8, 1.25  # tokens, or times, by which the longest note of a group may exceed the shortest


@dataclass(frozen=True)
class Group:
    """Consecutive notes of the row, of similar length."""

    first: int  # the first of their tokens in the row
    last: int  # the token after their last one
    padded_index: Tensor  # [last - first] of each token in these notes, padded at their ends: note * T + position
    num_notes: int
    max_length: int  # T, of the longest of them

    def padded(self, row: Tensor) -> Tensor:
        """The whole row [S, ...] -> these notes [num_notes, T, ...], zeros after their ends."""
        empty = row.new_zeros(self.num_notes * self.max_length, *row.shape[1:])
        filled = empty.index_copy(0, self.padded_index, row[self.first : self.last])
        return filled.unflatten(0, (self.num_notes, self.max_length))

    def packed(self, padded: Tensor) -> Tensor:
        """The inverse for these notes: [num_notes, T, ...] -> [last - first, ...]."""
        return padded.flatten(0, 1).index_select(0, self.padded_index)


@dataclass(frozen=True)
class Packing:
    """The positions of the tokens of N notes in their one row. The shortest note comes first."""

    index: Tensor  # [R] of each token in the padded notes: note * T + position
    positions: Tensor  # [R] of each token in its note
    ends: Tensor  # [N + 1] int32: 0, and where each note ends among the S tokens
    groups: tuple[Group, ...]
    spread: Tensor | None  # [S] where each token of all notes is in the row; None: the row has every token
    first_copies: Tensor | None  # [R] where each token of the row is first among the tokens of all notes
    num_empty: int = 0  # positions after the R, of no note

    @classmethod
    def of(cls, attention_mask: Tensor, num_shared: int = 0) -> "Packing":
        """The packing of notes with this `attention_mask` [N, T]: 0 on padding, which may be on either side.

        `num_shared`: length of the prefix that all notes share.
        """
        num_notes, width = attention_mask.shape
        lengths, order = attention_mask.sum(1).sort(stable=True)  # [N]
        real = attention_mask[order].bool()
        positions = (attention_mask[order].cumsum(1) - 1)[real]
        index = (order[:, None] * width + torch.arange(width, device=real.device))[real]
        ends = functional.pad(lengths.cumsum(0), (1, 0))
        groups = _groups(lengths.tolist(), positions)
        assert num_notes == sum(group.num_notes for group in groups)
        if not num_shared:
            return cls(index, positions, ends.to(torch.int32), groups, None, None)
        own = positions >= num_shared
        own[: lengths[0]] = True  # the first note has the prefix for all
        spread = torch.where(own, own.cumsum(0) - 1, positions)
        first_copies = own.nonzero()[:, 0]
        return cls(index[first_copies], positions[first_copies], ends.to(torch.int32), groups, spread, first_copies)

    def with_empty(self, row: Tensor) -> Tensor:
        """[R, ...] -> [R + num_empty, ...], zeros in the empty positions."""
        return torch.cat([row, row.new_zeros(self.num_empty, *row.shape[1:])]) if self.num_empty else row

    def rows(self, positions: Tensor, width: int) -> Tensor:
        """[N n] positions in the row of the tokens at `positions` [N, n] of the padded notes, `width` tokens each."""
        row = self.index.new_zeros(len(positions) * width)
        row[self.index] = torch.arange(len(self.index), device=row.device)
        first = torch.arange(len(positions), device=row.device)[:, None] * width
        return row[(first + positions).flatten()]


def _groups(lengths: Sequence[int], positions: Tensor) -> tuple[Group, ...]:
    """Notes, sorted by length, cut into groups in which none is padded by much."""
    groups = []
    start = first = 0
    while start < len(lengths):
        longest = max(lengths[start] + _MAX_PADDING, int(lengths[start] * _MAX_RATIO))
        end = bisect_right(lengths, longest, start)
        last = first + sum(lengths[start:end])
        notes = torch.tensor(lengths[start:end], device=positions.device)
        note = torch.arange(end - start, device=positions.device).repeat_interleave(notes)
        padded_index = note * lengths[end - 1] + positions[first:last]
        groups.append(Group(first, last, padded_index, end - start, lengths[end - 1]))
        start, first = end, last
    return tuple(groups)
