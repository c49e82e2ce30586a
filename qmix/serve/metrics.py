"""Figures for Prometheus: requests, tokens, times, the queue, the pool of experts, memory against its budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qmix.engine.completion import BatchResult
from qmix.machine.found import own_memory, peak_memory
from qmix.serve.service import Outcome, Service, Ticket

TTFT_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TPOT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counts what clients asked and got; the rest is read from `service` when somebody looks."""

    def __init__(self, service: Callable[[], Service]) -> None:
        self.registry, self._service = CollectorRegistry(), service
        names = ["path", "status"]
        self.requests = Counter("qmix_http_requests", "Requests by path and status", names, registry=self.registry)
        self.ttft = Histogram(
            "qmix_ttft_seconds", "Time to the first token", buckets=TTFT_SECONDS, registry=self.registry
        )
        self.tpot = Histogram(
            "qmix_tpot_seconds", "Time of each token after it", buckets=TPOT_SECONDS, registry=self.registry
        )
        self.ended = Counter("qmix_answers", "Answers by their end", ["finish_reason"], registry=self.registry)
        self.registry.register(self)

    def on_end(self, ticket: Ticket, outcome: Outcome) -> None:
        """Count a finished ticket."""
        self.ended.labels(outcome.finish_reason if isinstance(outcome, BatchResult) else "error").inc()
        if ticket.first is None or ticket.bulk:
            return
        self.ttft.observe(ticket.first - ticket.asked)
        if ticket.count > 1:
            self.tpot.observe((ticket.last - ticket.first) / (ticket.count - 1))

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        """Return no description: `collect` needs a running service."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of the engine."""
        service = self._service()
        runner = service.runner
        work, counters, plan = runner.work, runner.pool.counters, runner.plan
        for name, text, count in (
            ("qmix_prompt_tokens", "Prompt tokens of answers that have begun", work.prompt_tokens),
            ("qmix_reused_tokens", "Prompt tokens that were not computed again", work.reused_tokens),
            ("qmix_new_tokens", "Tokens of answers", work.new_tokens),
            ("qmix_passes", "Forward passes", work.passes),
            ("qmix_read_bytes", "Bytes of experts read from disk", counters.bytes_read),
            ("qmix_expert_hits", "Requested experts that were in memory", counters.hits),
            ("qmix_expert_misses", "Requested experts that were read", counters.misses),
        ):
            yield CounterMetricFamily(name, text, value=count)
        for name, text, value in (
            ("qmix_requests_running", "Requests that have a place", service.running),
            ("qmix_requests_waiting", "Requests in the queue", service.waiting),
            ("qmix_batch_size", "Places", plan.batch),
            ("qmix_expert_hit_rate", "Share of requested experts that were in memory", counters.hit_rate),
            ("qmix_memory_bytes", "Resident memory now", own_memory()),
            ("qmix_memory_peak_bytes", "Most resident memory so far", peak_memory()),
            ("qmix_memory_budget_bytes", "Budget of the process", plan.ram),
        ):
            yield GaugeMetricFamily(name, text, value=value)
