"""The dashboards beside this file, as Grafana's JSON:  python -m k8s.dashboards.generate

Writes k8s/base/dashboards/*.json, of which kustomize makes ConfigMaps. A test compares them with what it would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphGradientMode,
    StackingMode,
    TableCellBackgroundDisplayMode,
    TableColoredBackgroundCellOptions,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    FieldColorModeId,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from k8s.dashboards.engine import ENGINE
from k8s.dashboards.experts import EXPERTS
from k8s.dashboards.fleet import FLEET
from k8s.dashboards.panels import Dashboard, Panel, Query
from k8s.dashboards.service import SERVICE

DASHBOARDS = (SERVICE, ENGINE, EXPERTS, FLEET)
TARGET = Path(__file__).parents[1] / "base" / "dashboards"
SCHEMA_VERSION = 41
TAG = "mixtral"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 8

# Values of a label are asked of a metric that every replica has.
LABEL_SOURCES = {
    "model": "mixtral_healthy",
    "replica": 'mixtral_healthy{model=~"$model"}',
    "rank": 'mixtral_rank_up{model=~"$model",replica=~"$replica"}',
    "layer": 'mixtral_expert_tokens_total{model=~"$model"}',
}
# Bounds of histogram buckets: an objective between two of them could not be asked for.
OBJECTIVES = {
    "slo_first": ("First token within (s)", ("0.2", "0.5", "1.0", "2.0", "5.0"), "1.0"),
    "slo_between": ("Token within (s)", ("0.02", "0.05", "0.1", "0.2", "0.5"), "0.1"),
}


def document(dashboard: Dashboard) -> dict[str, Any]:
    builder = (
        builders.Dashboard(dashboard.title)
        .uid(f"mixtral-{dashboard.name}")
        .tags([TAG])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .link(builders.DashboardLink("Mixtral").type(DashboardLinkType.DASHBOARDS).tags([TAG]).include_vars(True))
        .with_variable(builders.DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
    )
    for name in dashboard.variables:
        builder.with_variable(_variable(name))
    number = 0
    for title, panels in dashboard.sections:
        builder.with_row(builders.Row(title))
        for panel in panels:
            number += 1
            builder.with_panel(_panel(panel).id(number))
    made: dict[str, Any] = json.loads(JSONEncoder().encode(builder.build()))
    made["schemaVersion"] = SCHEMA_VERSION
    for row, panel in enumerate(one for one in made["panels"] if one["type"] == "row"):
        panel["id"] = 1000 + row
    return made


def _variable(name: str) -> Any:
    if name in OBJECTIVES:
        label, values, default = OBJECTIVES[name]
        return (
            builders.CustomVariable(name)
            .label(label)
            .values(",".join(values))
            .options([VariableOption(text=value, value=value, selected=value == default) for value in values])
            .current(VariableOption(text=default, value=default, selected=True))
        )
    variable = (
        builders.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": f"label_values({LABEL_SOURCES[name]}, {name})", "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    if name == "layer":  # one at a time
        return variable.current(VariableOption(text="0", value="0", selected=True))
    everything = VariableOption(text="All", value="$__all", selected=True)
    return variable.multi(True).include_all(True).all_value(".*").current(everything)


def _panel(panel: Panel) -> Any:
    match panel.kind:
        case "number":
            builder: Any = stat.Panel()
        case "matrix":
            builder = _matrix(panel)
        case _:
            builder = timeseries.Panel().fill_opacity(10).gradient_mode(GraphGradientMode.NONE).min(0)
            if panel.kind == "stacked":
                builder.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
    builder.title(panel.title).description(panel.why).unit(panel.unit).datasource(SOURCE)
    for place, query in enumerate(panel.queries):
        builder.with_target(_target(query, "ABCDEFGH"[place], panel))
    return builder.height(HEIGHT).span(panel.width)


def _target(query: Query, ref_id: str, panel: Panel) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(ref_id).datasource(SOURCE)
    return target.instant().format(PromQueryFormat.TABLE) if panel.kind == "matrix" else target.range()


def _matrix(panel: Panel) -> table.Panel:
    """Rows and columns by two labels, as numbers and in order, each cell coloured by its value."""
    rows, columns = panel.matrix
    as_numbers = [{"targetField": label, "destinationType": "number"} for label in panel.matrix]
    into_matrix = {"rowField": rows, "columnField": columns, "valueField": "Value", "emptyValue": "null"}
    coloured = TableColoredBackgroundCellOptions(mode=TableCellBackgroundDisplayMode.BASIC)
    return (
        table.Panel()
        .with_transformation(DataTransformerConfig(id_val="convertFieldType", options={"conversions": as_numbers}))
        .with_transformation(DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": columns}]}))
        .with_transformation(DataTransformerConfig(id_val="groupingToMatrix", options=into_matrix))
        .with_transformation(
            DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": f"{rows}\\{columns}"}]})
        )
        .cell_options(coloured)
        .color_scheme(builders.FieldColor().mode(FieldColorModeId.CONTINUOUS_YL_RD))
    )


def text(dashboard: Dashboard) -> str:
    return json.dumps(document(dashboard), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        (TARGET / f"{dashboard.name}.json").write_text(text(dashboard))
        print(f"{dashboard.title}: {len(dashboard.panels)} panels")


if __name__ == "__main__":
    main()
