"""What happens in a simulated year, fixed beforehand: late and absent logs, worse models, rollbacks and backfills.

Weeks are counted from the first that is run. A shorter year is the beginning of this one.
"""

from collections.abc import Mapping

NUM_WEEKS = 52
LATE = frozenset({2, 11, 19, 27, 35, 44})  # the last two days come later than the others
ABSENT = frozenset({6, 31})  # nothing comes; four weeks later it does, and the week is run as a backfill
WORSE = frozenset({8, 24, 40})  # the trained model is worse than the one before, by more than may be lost
# After this week is live, it is rolled back, and then run again; in the second, while the week itself is running.
ROLLED_BACK = frozenset({4, 22, 46})
DURING_A_RUN = 22
BACKFILLS: Mapping[int, tuple[int, ...]] = {10: (6, 3), 37: (31, 29)}  # after a week: older weeks that are run
AGAIN = frozenset({5})  # is run a second time, with nothing new
USUAL_NOISE, WORSE_NOISE = 1.0, 1.6
