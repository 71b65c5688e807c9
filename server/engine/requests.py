"""The open requests: what each holds, what it is told as its tokens come, and the one way it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from server.engine.blocks import chain_seed
from server.engine.counting import Counting
from server.engine.loading import AdapterLoader
from server.engine.merging import MergedCopies
from server.engine.messages import Delta, Done, Event, Residency, Submit
from server.engine.sampler import Choice
from server.engine.scheduler import Scheduler
from server.engine.sequence import Request, Sequence
from server.engine.stats import Stats
from server.engine.text import TextStream
from server.errors import OnebaseError, UnusableOutput
from server.model.loader import Base

log = logging.getLogger("onebase.engine")


class Requests:
    """On the engine's thread. Each that is opened ends in exactly one Done; `tell` takes the events, in order."""

    def __init__(
        self,
        base: Base,
        scheduler: Scheduler,
        loader: AdapterLoader,
        merged: MergedCopies,
        counts: Counting,
        stats: Stats,
        tell: Callable[[Event], None],
    ):
        self._base, self._scheduler, self._loader, self._merged = base, scheduler, loader, merged
        self._counts, self._stats, self._tell = counts, stats, tell
        self._open: dict[str, Request] = {}
        self._order = 0

    def open(self, submit: Submit) -> None:
        """Its sequences join the scheduler's line; its adapter is on its way, or it runs on a merged copy."""
        adapter = submit.adapter.digest if submit.adapter else ""
        held = self._merged.acquire(submit.adapter) if submit.adapter is not None else None
        # What a merged lane computes differs in its last bits from what the shared one does.
        kind = b"merged" if held is not None else b""
        seed = chain_seed(self._base.info.digest.encode(), adapter.encode(), submit.salt, kind)
        request = Request(submit, seed, submit.arrived, held=held)
        self._open[submit.id] = request
        if held is not None:
            request.residency = Residency(merged=True)
            self._loader.unasked(submit)
        elif submit.adapter is not None:
            self._loader.want(request)
        if request.ready:
            request.given = request.arrived
        for index in range(submit.n):
            self._order += 1
            text = TextStream(self._base.tokenizer, submit.sampling.stop)
            sequence = Sequence(request, index, self._order, list(submit.prompt), text)
            request.sequences.append(sequence)
            self._scheduler.add(sequence)

    def take(self, sequence: Sequence, choice: Choice, now: float) -> None:
        """A token that a step made, which ended at `now`; of no effect where the sequence or its request has ended."""
        if sequence.finish_reason is not None or sequence.request.submit.id not in self._open:
            return
        try:
            self._take(sequence, choice, now)
        except Exception:  # a tokenizer that cannot decode, say: that request's fault alone
            log.exception("a token could not be taken")
            self.end(sequence.request, "error", UnusableOutput("the answer could not be decoded"))

    def cancel(self, request_id: str) -> None:
        """Of no effect on a request that has ended."""
        request = self._open.get(request_id)
        if request is not None:
            self.end(request, "cancelled")

    def end(self, request: Request, outcome: str, error: OnebaseError | None = None) -> None:
        """The one way a request ends: its Done goes out with the step's events, and everything it holds goes back. Of
        no effect on one that has ended."""
        if self._open.pop(request.submit.id, None) is None:
            return
        cached, made, prompt = request.cached, request.produced, request.read
        times = request.times(monotonic())
        self._tell(Done(request.submit.id, outcome, prompt, cached, made, request.residency, error, times))
        self._counts.ended(request, outcome, times)
        self._stats.prompt_tokens += prompt
        self._stats.cached_tokens += cached
        self._stats.outcomes[outcome] = self._stats.outcomes.get(outcome, 0) + 1
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._scheduler.remove(sequence)
        if request.held is not None:
            self._merged.release(request.held)
            request.held = None
        else:
            self._loader.give_up(request)

    def end_all(self, fault: OnebaseError | None) -> None:
        """Ends what is open, whatever goes wrong with one of them."""
        for request in list(self._open.values()):
            try:
                self.end(request, "error", fault)
            except Exception:  # a broken account must not keep the others from ending
                log.exception("a request could not give back what it held")

    def _take(self, sequence: Sequence, choice: Choice, now: float) -> None:
        request = sequence.request
        if not choice.finite:
            fault = UnusableOutput("the model's output for this request was not finite", code="not_finite")
            self.end(request, "error", fault)
            return
        if request.first is None:
            request.first = now
            self._counts.first(request, now)
        self._counts.token(sequence, now)
        self._stats.generated_tokens += 1
        ended = choice.token in self._base.eos_ids and not request.submit.sampling.ignore_eos
        text = sequence.take(choice.token, ended=ended)
        spent = request.submit.most is not None and request.produced >= request.submit.most
        if spent and not sequence.finish_reason:
            sequence.finish_reason = "budget"
        self._answer(sequence, text, [choice])
        if spent:  # nothing is left for the other answers either, whatever this step has computed for them
            for other in request.sequences:
                if not other.finish_reason:
                    other.finish_reason = "budget"
                    self._answer(other, "", [])
        if all(s.finish_reason for s in request.sequences):
            self.end(request, "finished")

    def _answer(self, sequence: Sequence, text: str, choices: list[Choice]) -> None:
        """The next event of a sequence, with the rest of its text and its place given back if it has ended."""
        request = sequence.request
        if sequence.finish_reason:
            text += sequence.rest()
            self._scheduler.remove(sequence)
        tokens, logprobs = [one.token for one in choices], [one.logprob for one in choices if one.logprob]
        reason, cached = sequence.finish_reason, request.cached
        self._tell(Delta(request.submit.id, sequence.index, text, tokens, logprobs, request.residency, reason, cached))
