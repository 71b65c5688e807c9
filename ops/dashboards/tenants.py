"""The page on the tenants: what they use, what they pay, who meets a limit, and whether shares are fair."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from ops.dashboards.panels import Panel, Row, number, of, page, quantile, ranking, rate, series, total

CHOSEN = 'tenant=~"$tenant",adapter=~"$adapter"'
TENANT = 'tenant=~"$tenant"'
DOLLARS = "currencyUSD"


def tenants() -> dashboard.Dashboard:
    """Usage, cost, limits met, fairness, and whether the bill is written down."""
    rows = [
        Row("Now", _now()),
        Row("Usage and cost", _usage()),
        Row("Latency and fair share", _shares()),
        Row("Limits", _limits()),
        Row("The bill's way", _bill()),
    ]
    text = "Who uses and pays what, who meets a limit, and whether shares are fair. The bill itself is the ledger's."
    return page("onebase-tenants", "Tenants", text, rows, ("tenant", "adapter"))


def _now() -> list[Panel]:
    spent = total("onebase_tenant_cost_microusd_total", TENANT)
    return [
        number("Income", "Dollars an hour at the present rate.", DOLLARS, f"{spent} * 3600 / 1e6"),
        number(
            "Fairness now",
            "Jain's index over what tenants with work have had for their weight: 1 is alike, 1/n is all to one.",
            "none",
            f"min({of('onebase_fairness_index')})",
        ),
        number(
            "Refused",
            "Requests over their tenant's own limit, a second.",
            "reqps",
            total("onebase_limit_refusals_total"),
        ),
        number(
            "Not yet on disk",
            "Age of the oldest usage record that is not committed. Answers wait for it.",
            "s",
            f"max({of('onebase_ledger_lag_seconds')})",
            warn=1,
            bad=10,
        ),
        number(
            "Soft budgets passed",
            "Budget windows that went over their soft budget in the last day.",
            "none",
            f"sum(increase({of('onebase_soft_budget_warnings_total')}[1d]))",
            warn=1,
        ),
    ]


def _usage() -> list[Panel]:
    tokens, cost = "onebase_adapter_tokens_total", "onebase_adapter_cost_microusd_total"
    whole = "onebase_tenant_cost_microusd_total"
    return [
        series(
            "Tokens by tenant",
            "Prompt and completion tokens a second.",
            "short",
            (_by("onebase_tenant_tokens_total", TENANT + ',kind=~"prompt|completion"'), "{{tenant}}"),
            stacked=True,
        ),
        series(
            "Cost by tenant",
            "Dollars an hour for tokens; stored adapters and merged lanes come on top of it on the bill.",
            DOLLARS,
            (f"{_by(whole, TENANT)} * 3600 / 1e6", "{{tenant}}"),
            stacked=True,
        ),
        series(
            "Requests by tenant",
            "Requests ended a second.",
            "reqps",
            (_by("onebase_tenant_requests_total", TENANT), "{{tenant}}"),
            stacked=True,
        ),
        ranking(
            "Who pays",
            "Micro-dollars for tokens in the chosen time, of all the tenant's adapters. The invoice is the ledger's.",
            "none",
            f"topk(50, sum by (tenant) (increase({of(whole, TENANT)}[$__range])))",
        ),
        ranking(
            "Who pays what",
            "The same by tenant and adapter. Beyond METRICS_TOP pairs of them the rest is `other`.",
            "none",
            f"topk(50, sum by (tenant, adapter) (increase({of(cost, CHOSEN)}[$__range])))",
        ),
        ranking(
            "Who uses what",
            "Completion tokens in the chosen time, by tenant and adapter.",
            "short",
            f"""topk(50, sum by (tenant, adapter) (increase({of(tokens, CHOSEN + ',kind="completion"')}[$__range])))""",
        ),
    ]


def _shares() -> list[Panel]:
    parts = "onebase_tenant_request_part_seconds_total"
    return [
        series(
            "First token by tenant, p95",
            "Who is slow. Compare it with the tenant's waiting sequences and with its limits.",
            "s",
            (quantile(0.95, "onebase_tenant_ttft_seconds", "le,tenant", TENANT), "{{tenant}}"),
        ),
        series(
            "Where a tenant's time goes",
            "Mean seconds of its requests: waiting for the adapter or for room, computing the prompt, generating.",
            "s",
            (
                f"sum by (tenant, part) ({rate(parts, TENANT)}) / on (tenant) group_left ()"
                f" ({_by('onebase_tenant_requests_total', TENANT)} > 0)",
                "{{tenant}}: {{part}}",
            ),
        ),
        series(
            "Sequences by tenant",
            "In the batch, and waiting for their turn.",
            "short",
            (f"sum by (tenant) ({of('onebase_tenant_running', TENANT)})", "running {{tenant}}"),
            (f"sum by (tenant) ({of('onebase_tenant_waiting', TENANT)})", "waiting {{tenant}}"),
        ),
        series(
            "Share by tenant",
            "Priced tokens a second that each tenant was given; by weight they should be alike among those who wait.",
            "short",
            (_by("onebase_tenant_served_tokens_total", TENANT), "{{tenant}}"),
            stacked=True,
        ),
        series(
            "Fairness",
            "Jain's index over what tenants with work have had for their weight; 1 where they are served alike.",
            "none",
            (of("onebase_fairness_index"), "{{instance}}"),
            most=1,
        ),
        series(
            "Refused by the queue",
            "Requests a second that found the queue full, by whose part of it was full.",
            "reqps",
            (total("onebase_queue_refusals_total", by="reason"), "{{reason}}"),
        ),
    ]


def _limits() -> list[Panel]:
    refused = "onebase_tenant_limit_refusals_total"
    return [
        series(
            "Limits met",
            "Requests a second that were answered 429, by tenant and limit.",
            "reqps",
            (f"sum by (tenant, code) ({rate(refused, TENANT)})", "{{tenant}}: {{code}}"),
            width=12,
        ),
        ranking(
            "Limits met in the chosen time",
            "By tenant and limit: who needs a larger one, or a word.",
            "short",
            f"topk(20, sum by (tenant, code) (increase({of(refused, TENANT)}[$__range])))",
            width=12,
        ),
    ]


def _bill() -> list[Panel]:
    return [
        series(
            "Ledger",
            "Age of the oldest record that is not committed, and how many wait. Answers end when theirs is.",
            "short",
            (f"max({of('onebase_ledger_lag_seconds')})", "lag, seconds"),
            (f"sum({of('onebase_ledger_queued')})", "waiting"),
        ),
        series(
            "Commits",
            "Commits of the ledger a second, and those that the database refused.",
            "short",
            (total("onebase_ledger_commits_total"), "commits"),
            (total("onebase_ledger_failures_total"), "refused"),
        ),
        series(
            "Outbox",
            "Age of the oldest usage event not yet taken, and what became of others. Empty without EVENTS_URL.",
            "short",
            (f"max({of('onebase_outbox_oldest_seconds')})", "oldest, seconds"),
            (total("onebase_outbox_events_total", by="outcome"), "{{outcome}} a second"),
        ),
    ]


def _by(metric: str, more: str) -> str:
    return f"sum by (tenant) ({rate(metric, more)})"
