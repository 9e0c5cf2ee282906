"""From interactions to histories. test_eq2.py shows that the pairs of the histories are those of Eq. 2."""

from typing import Any

import numpy as np
import pytest

from spark_jobs.scoring.histories import HISTORIES, NEVER, Capped, Follows, Histories, histories, summed

ROWS = [  # user, note, first view, last click
    (0, 5, 1, None),
    (0, 6, 2, 4),
    (0, 7, 3, 3),
    (0, 6, 4, 6),  # of another partition: the later click on 6 and its earlier view count
    (1, 5, 9, 9),
]


def histories_of(
    rows: list[tuple[int, int, int, int | None]], follows: Follows, max_notes: int | None = None
) -> tuple[Histories, Capped]:
    columns = (np.array([NEVER if v is None else v for v in column], np.int64) for column in zip(*rows, strict=True))
    user, note, view, click = columns
    return histories(user, note, view, click, follows, max_notes)


@pytest.mark.parametrize(
    ("follows", "views", "skips", "clicks"),
    [
        ("later", [5, 6, 7], [0, 0, 1], [7, 6]),  # 7 was clicked when it was viewed; then only 6 follows
        ("not earlier", [5, 6, 7], [0, 0, 0], [7, 6]),
        ("any", [6, 7], [0, 0], [7, 6]),
    ],
)
def test_histories_of_one_user(follows: Follows, views: list[int], skips: list[int], clicks: list[int]) -> None:
    rows = [row for row in ROWS if row[0] == 0 and (follows != "any" or row[3] is not None)]
    built, _ = histories_of(rows, follows)
    [(block, chunk)] = built.chunks(1)
    expected = {"num_clicked": 2, "views": views, "skips": skips, "clicks": clicks}
    assert block == 0 and chunk.schema == HISTORIES and chunk.to_pylist() == [expected]


def test_a_block_has_its_views_and_the_clicks_that_follow_them() -> None:
    """User 1 has no pair: its only click is on the note that it viewed last. Block 1 has the notes 5 and 7."""
    built, _ = histories_of(ROWS, "later")
    chunks: dict[int, list[dict[str, Any]]] = {block: chunk.to_pylist() for block, chunk in built.chunks(2)}
    assert chunks == {
        0: [{"num_clicked": 2, "views": [6], "skips": [0], "clicks": [7, 6]}],
        1: [{"num_clicked": 2, "views": [5, 7], "skips": [0, 1], "clicks": [7, 6]}],
    }


def test_disjoint_losses_do_not_add_up() -> None:
    """A thousand users view eleven notes each, all different, and click the last. A score loses at most 1, not 1000."""
    rows = [(u, 20 * u + n, n, None if n < 10 else 99) for u in range(1000) for n in range(11)]
    capped = histories_of(rows, "later", max_notes=10)[1]
    assert capped.users == 1000 and capped.loss == 1000.0 and capped.note_loss.tolist() == [1.0] * 1000


def test_summed() -> None:
    keys, sums = summed(np.array([2, 1, 2]), np.array([0.5, 1.0, 0.25]))
    assert keys.tolist() == [1, 2] and sums.tolist() == [1.0, 0.75]
