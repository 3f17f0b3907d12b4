from __future__ import annotations

import pickle
from dataclasses import MISSING, fields

from cluster.messages import SequenceChunk


def test_a_chunk_arrives_as_it_was_sent() -> None:
    chunk = SequenceChunk(7, (1, 2, 3), 40, (5, 6), sample=True, num_stored=2)
    for field in fields(SequenceChunk):
        assert field.default is MISSING or getattr(chunk, field.name) != field.default, "what is left out must be seen"
    assert pickle.loads(pickle.dumps(chunk)) == chunk
