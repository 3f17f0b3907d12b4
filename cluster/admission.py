"""Which data group a sequence goes to. A pure choice: nothing is held and nobody moves.

    group   pages found for its first tokens   pages free   runs
    0                     3                        40         5     chosen: most of it is there already
    1                     0                        90         3

A group that is full, or whose budget of this step is spent, is not asked. The sequence stays where it goes until it
is preempted or done.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from cluster.data_group import DataGroup, GroupStep
from cluster.sequence import Sequence

# Prompts that begin alike must not all crowd into one group while others idle: a group that runs so many more than the
# emptiest comes last, whatever is found there.
CROWD = 8


@dataclass(frozen=True, slots=True)
class Place:
    group: DataGroup
    step: GroupStep
    pages: list[int]  # that hold the sequence's first tokens there


def choose_place(
    sequence: Sequence, groups: Many[DataGroup], steps: Many[GroupStep], max_step_tokens: int
) -> Place | None:
    """Of the groups that are not crowded the one with the longest prefix, then the most free pages, then the first.

    None: the sequence has to wait.
    """
    if groups[0].pool.prefix_caching and not sequence.wants_all_rows:
        groups[0].pool.extend(sequence.digests, sequence.token_ids, sequence.salt)
    crowd = min(len(group.running) for group in groups) + CROWD
    best, merit = None, (False, 0, -1)
    for group, step in zip(groups, steps, strict=True):
        if not step.budget:
            continue
        pages = group.prefix(sequence)
        if not group.fits(sequence, pages, max_step_tokens):
            continue
        leads = sequence.leader is not None and group.has_prompt_of(sequence.leader)
        this = (leads or len(group.running) < crowd, len(pages), group.pool.num_available)
        if this > merit:
            best, merit = Place(group, step, pages), this
    return best
