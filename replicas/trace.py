"""From the timeline of a choice to OpenTelemetry spans, made at its end: no step pays for them.

    triad.replica      one a choice, submission to end; its events are the mode shifts
      triad.queue      until the scheduler took it
      triad.prefill    until the first token
      triad.decode     one for each time in one mode, with forwards and tokens

No text of the prompt or the answer is in any of them.
"""

import time
from collections.abc import Callable
from itertools import pairwise

from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context

from replicas.errors import ErrorCode
from replicas.timeline import Timeline
from telemetry.propagation import parent_context


class SpanWriter:
    """Writes the spans of a timeline.

    clock: the one the timelines were made by; seconds
    """

    def __init__(self, tracer: Tracer, replica_id: str, clock: Callable[[], float] = time.monotonic):
        self._tracer = tracer
        self._replica_id = replica_id
        self._clock = clock

    def __call__(self, timeline: Timeline) -> None:
        # The engine's clock is monotonic and a span's is not.
        offset_ns = time.time_ns() - round(self._clock() * 1e9)

        def ns(at_s: float) -> int:
            return offset_ns + round(at_s * 1e9)

        assert timeline.ended_s is not None
        ended_s = timeline.ended_s
        root = self._tracer.start_span(
            "triad.replica",
            parent_context(timeline.trace_carrier),
            SpanKind.SERVER,
            attributes={
                "triad.request.id": timeline.request_id,
                "triad.replica.id": self._replica_id,
                "triad.choice.index": timeline.index,
                "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
                "gen_ai.usage.output_tokens": sum(spell.num_tokens for spell in timeline.spells),
                "triad.reused_tokens": timeline.num_reused_tokens,
                "triad.preemptions": timeline.num_preemptions,
            },
            start_time=ns(timeline.submitted_s),
        )
        if timeline.error is not None:
            root.set_attribute("error.type", timeline.error.value)
            if timeline.error is not ErrorCode.CANCELLED:
                root.set_status(Status(StatusCode.ERROR, timeline.error.value))
        for before, after in pairwise(timeline.spells):
            shift = {
                "triad.mode.from": before.mode.value,
                "triad.mode.to": after.mode.value,
                "triad.rule": after.rule,
            }
            root.add_event("triad.mode_shift", shift, ns(after.since_s))

        inside = set_span_in_context(root)
        began_s = ended_s if timeline.began_s is None else timeline.began_s
        queue = self._tracer.start_span("triad.queue", inside, start_time=ns(timeline.submitted_s))
        queue.end(ns(began_s))
        if timeline.began_s is not None:
            first_s = ended_s if timeline.first_token_s is None else timeline.first_token_s
            counts = {
                "triad.prompt_tokens": timeline.num_prompt_tokens,
                "triad.reused_tokens": timeline.num_reused_tokens,
            }
            prefill = self._tracer.start_span(
                "triad.prefill", inside, attributes=counts, start_time=ns(began_s)
            )
            prefill.end(ns(first_s))
        for spell in timeline.spells:
            decode = self._tracer.start_span(
                "triad.decode",
                inside,
                attributes={
                    "triad.mode": spell.mode.value,
                    "triad.rule": spell.rule,
                    "triad.forwards": spell.num_forwards,
                    "triad.tokens": spell.num_tokens,
                },
                start_time=ns(spell.since_s),
            )
            decode.end(ns(spell.until_s))
        root.end(ns(ended_s))
