"""`docs/operations.md` lists every metric and every error, and no other."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from mi_runtime.request import Dial, EngineInfo
from server.ops.metrics import EngineState, Metrics
from server.ops.routing_metrics import RoutingCollector, RoutingState
from server.routing.observed_lengths import ObservedLengths
from server.routing.routing_decision import RoutingDecision
from server.wire.errors import ApiError, Unavailable

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Returns the cells of a section's table rows."""
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("pair")
    info = EngineInfo("", "", "", "", "", "", 1, 1, 1, 1, 1, 1, 1, 0.0)
    metrics.follow_engine(lambda: EngineState(info=info))
    observations = ObservedLengths(["default"])
    observations.add("default", 0.5, 7, cut=False)
    state = RoutingState(observations, elastic=False)
    metrics.registry.register(RoutingCollector("pair", lambda: state))
    return metrics


def kinds_by_name(metrics: Metrics) -> dict[str, str]:
    """Returns the kind of each metric by its scraped name."""
    families = list(metrics.registry.collect())
    ends = {"counter": "_total"}
    return {f"{it.name}{ends.get(it.type, '')}": it.type for it in families}


def test_the_page_has_a_row_for_each_metric_and_no_other(metrics: Metrics) -> None:
    documented = {row[0].strip("`"): row[1] for row in rows("Metrics")}
    assert documented == kinds_by_name(metrics)


def test_the_labels_of_a_metric_are_documented(metrics: Metrics) -> None:
    documented = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows("Metrics")}
    metrics.routed(RoutingDecision((Dial(0.5),), "body"))
    metrics.meter(0.5, 1, arrived=0.0, cap=5).close("stop", generation_tokens=1, reasoning_tokens=0)
    metrics.rejected("overloaded")
    seen = 0
    for family in metrics.registry.collect():
        for sample in family.samples:
            name = family.name + ("_total" if family.type == "counter" else "")
            assert set(sample.labels) - {"model_name", "le", "quantile"} == documented[name]
            seen += 1
    assert seen > len(documented)


def test_alerts_query_metrics_that_exist(metrics: Metrics) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", section("Alerts to set"), re.DOTALL)
    rules = [rule for group in yaml.safe_load(block)["groups"] for rule in group["rules"]]
    known = kinds_by_name(metrics)
    queried = {name for rule in rules for name in re.findall(r"\bmi_\w+", rule["expr"])}
    assert len(queried) > 5
    for name in queried:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in known or known.get(base) == "histogram", name


def errors(above: type[ApiError] = ApiError) -> Iterator[type[ApiError]]:
    """Yields an error class and all classes below it."""
    yield above
    for below in above.__subclasses__():
        yield from errors(below)


def test_the_page_has_a_row_for_each_error_and_no_other() -> None:
    documented = {(row[0].strip("`"), int(row[1])) for row in rows("What each error means")}
    of_the_server = {(it.code, it.status) for it in errors() if it is not Unavailable}
    assert documented == of_the_server | {("method_not_allowed", 405)}
