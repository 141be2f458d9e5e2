"""Which segments of a step are completed on the device, and from what."""

from collections.abc import Mapping, Sequence

import numpy as np

from replicas.engine.batch import Segment
from replicas.kernels.follow import Open
from replicas.model.cuda.inputs import HostStep
from replicas.model.cuda.sampling import first_rows
from replicas.model.sampler import uniforms


def opens_of(segments: Sequence[Segment], host: HostStep, before: Mapping[int, int]) -> list[Open]:
    """The segments that follow others.

    host: the step as it is packed
    before: first_rows of the step before
    """
    opens = []
    own_rows = first_rows(segments)
    fields = host.sections["segments"].reshape(len(segments), -1).tolist()
    for index, segment in enumerate(segments):
        followed = segment.follows
        if followed is None:
            continue
        first_row, start, length, num_causal, first_page = fields[index]
        num_checked = followed.num_checked
        first = followed.wanted[0] + 1
        opens.append(
            Open(
                source=before[segment.seq_id],
                num_checked=num_checked,
                num_drafted=followed.num_drafted,
                drafted=followed.token_ids[first : first + num_checked - 1],
                segment=index,
                first_row=first_row,
                first_wanted=own_rows[segment.seq_id],
                start=start,
                num_causal=num_causal,
                num_masks=length - num_causal,
                first_page=first_page,
                uniforms=_uniforms(segment, num_checked),
            )
        )
    return opens


def _uniforms(segment: Segment, num_checked: int) -> np.ndarray | None:
    """The random numbers of all positions that its rows may come to predict, float32; None where it is
    greedy."""
    sampling = segment.sampling
    if not sampling.temperature > 0:
        return None
    count = num_checked - 1 + len(segment.wanted)
    positions = range(segment.start + 1, segment.start + 1 + count)
    return uniforms([sampling.seed] * count, positions).astype(np.float32)
