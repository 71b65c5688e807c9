"""The kinds of panel that the dashboards are made of. Each has a title, a sentence of help, a unit and its queries.

In a query `$__rate_interval` and the variables of the dashboard stand for themselves; Grafana puts values in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    TableSortByFieldState,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel: TypeAlias = timeseries.Panel | stat.Panel | table.Panel
Query: TypeAlias = tuple[str, str]  # an expression, and what its series are called

WIDTH = 24  # of Grafana's grid
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_EVERY = VariableOption(selected=True, text="All", value="$__all")


def series(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    warn: float | None = None,
    bad: float | None = None,
    stacked: bool = False,
    most: float | None = None,
    width: int = 8,
) -> timeseries.Panel:
    """Lines over time. `unit` is one of Grafana's; from `warn` and `bad` up the value is amber and red."""
    panel = timeseries.Panel().title(title).description(text).unit(unit).datasource(_SOURCE).span(width).height(8)
    panel = panel.min(0).thresholds(_thresholds(warn, bad)).fill_opacity(30 if stacked else 8).line_width(1)
    panel = panel.tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    legend = VizLegendOptions().display_mode(LegendDisplayMode.TABLE).placement(LegendPlacement.BOTTOM)
    panel = panel.legend(legend.calcs(["lastNotNull", "max"]).show_legend(True))
    if stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A"))
    if most is not None:
        panel = panel.max(most)
    for query in _targets(queries):
        panel = panel.with_target(query.range())
    return panel


def number(
    title: str,
    text: str,
    unit: str,
    query: str,
    *,
    warn: float | None = None,
    bad: float | None = None,
    least: float | None = None,
    width: int = 4,
) -> stat.Panel:
    """The latest value of one query, with its course behind it. Below `least` it is red."""
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(_SOURCE).span(width).height(4)
    panel = panel.thresholds(_thresholds(warn, bad, least)).reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(_targets([(query, "")])[0].range())


def ranking(title: str, text: str, unit: str, query: str, *, width: int = 8) -> table.Panel:
    """The series of one query now, the largest first."""
    panel = table.Panel().title(title).description(text).unit(unit).datasource(_SOURCE).span(width).height(9)
    panel = panel.thresholds(_thresholds(None, None)).sort_by(
        [TableSortByFieldState().display_name("Value").desc(True)]
    )
    hidden = {"Time": True, "__name__": True, "instance": True, "job": True}
    tidy = DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    target = _targets([(query, "")])[0].instant().format(PromQueryFormat.TABLE)
    return panel.with_target(target).with_transformation(tidy)


@dataclass(frozen=True)
class Row:
    """A heading and its panels."""

    title: str
    panels: Sequence[Panel]


def page(uid: str, title: str, text: str, rows: Sequence[Row], variables: Sequence[str] = ()) -> dashboard.Dashboard:
    """A dashboard with the variables `datasource` and `instance`, and those of `variables`: "tenant", "adapter"."""
    made = dashboard.Dashboard(f"onebase / {title}").uid(uid).description(text).tags(["onebase"]).readonly()
    made = made.time("now-1h", "now").refresh("10s").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    made = made.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    made = made.with_variable(_choice("instance", "Instance", "label_values(onebase_build_info, instance)"))
    for name in variables:
        made = made.with_variable(_choice(name, name.capitalize(), _LABELS[name]))
    made = made.link(
        dashboard.DashboardLink("The other pages")
        .type(DashboardLinkType.DASHBOARDS)
        .tags(["onebase"])
        .as_dropdown(True)
        .keep_time(True)
    )
    for row in rows:
        made = made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(panel)
    return made


_LABELS = {
    "tenant": 'label_values(onebase_adapter_requests_total{instance=~"$instance"}, tenant)',
    "adapter": 'label_values(onebase_adapter_requests_total{instance=~"$instance",tenant=~"$tenant"}, adapter)',
}


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    chosen = dashboard.QueryVariable(name).label(label).query(query).datasource(_SOURCE).hide(VariableHide.DONT_HIDE)
    chosen = chosen.multi(True).include_all(True).all_value(".*").current(_EVERY)
    return chosen.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)


def _targets(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().expr(expression).legend_format(name or "__auto").ref_id(chr(ord("A") + at))
        for at, (expression, name) in enumerate(queries)
    ]


def _thresholds(warn: float | None, bad: float | None, least: float | None = None) -> ThresholdsConfig:
    steps = [Threshold(value=None, color="green" if least is None else "red")]
    if least is not None:
        steps.append(Threshold(value=least, color="green"))
    steps += [Threshold(value=at, color=color) for at, color in ((warn, "#EAB839"), (bad, "red")) if at is not None]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def quantiles(metric: str, by: str = "") -> list[Query]:
    """Median, 95th and 99th percentile of a histogram, by a label if one is named."""
    groups, legend = (f"le,{by}", f" {{{{{by}}}}}") if by else ("le", "")
    return [(quantile(share, metric, groups), f"p{share * 100:g}{legend}") for share in (0.5, 0.95, 0.99)]


def quantile(share: float, metric: str, groups: str = "le", more: str = "") -> str:
    """One percentile of a histogram over the rate interval."""
    return f"histogram_quantile({share:g}, sum by ({groups}) ({rate(metric + '_bucket', more)}))"


def rate(metric: str, more: str = "") -> str:
    """A counter's increase by the second, of the chosen instances; `more` are further label matchers."""
    return f"rate({of(metric, more)}[$__rate_interval])"


def of(metric: str, more: str = "") -> str:
    """A metric's series on the chosen instances."""
    return f'{metric}{{instance=~"$instance"{"," + more if more else ""}}}'


def total(metric: str, more: str = "", by: str = "") -> str:
    """The sum of a counter's rates."""
    return f"sum{f' by ({by})' if by else ''} ({rate(metric, more)})"
