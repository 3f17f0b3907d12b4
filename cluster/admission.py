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

    A choice goes where its prompt's pages are: if there are enough for it, it waits for a step with tokens to spare,
    since elsewhere each choice would compute the prompt again. None: the sequence has to wait.
    """
    if groups[0].pool.prefix_caching and not sequence.wants_all_rows:
        groups[0].pool.extend(sequence.digests, sequence.token_ids, sequence.salt)
    crowd = min(len(group.running) for group in groups) + CROWD
    best, merit = None, (False, 0, -1)
    for group, step in zip(groups, steps, strict=True):
        leads = sequence.leader is not None and group.has_prompt_of(sequence.leader)
        if not step.budget and not leads:
            continue
        pages = group.prefix(sequence)
        if not group.fits(sequence, pages, max_step_tokens):
            continue
        if leads:
            return Place(group, step, pages) if step.budget else None
        this = (len(group.running) < crowd, len(pages), group.pool.num_available)
        if this > merit:
            best, merit = Place(group, step, pages), this
    return best
