"""The metrics of routing: observed reasoning tokens, and whether load changes λ."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.routing.observed_lengths import QUANTILES, LengthDigest, ObservedLengths


@dataclass(frozen=True, slots=True)
class RoutingState:
    """The state of routing at a scrape."""

    observed_lengths: ObservedLengths | None  # None: loading
    elastic: bool


class RoutingCollector(Collector):
    """Reads the metrics of routing at each scrape, by routing class and λ bucket."""

    def __init__(self, model_name: str, read: Callable[[], RoutingState]) -> None:
        self._model_name = model_name
        self._read = read

    def collect(self) -> Iterator[Metric]:
        state = self._read()
        active = GaugeMetricFamily(
            "mi_elastic_active",
            "1 while load gives requests without a λ a cheaper one.",
            labels=["model_name"],
        )
        active.add_metric([self._model_name], state.elastic)
        yield active
        yield self._observed(state.observed_lengths)

    def _observed(self, lengths: ObservedLengths | None) -> Metric:
        family = Metric(
            "mi_observed_reasoning_tokens",
            "Reasoning tokens of an answer by routing class; a truncated think block is the longest.",
            "summary",
        )
        for name, bucket, digest in lengths.filled() if lengths else ():
            labels = {
                "model_name": self._model_name,
                "routing_class": name,
                "lambda_bucket": bucket,
            }
            _add(family, labels, digest)
        return family


def _add(family: Metric, labels: dict[str, str], digest: LengthDigest) -> None:
    for share in QUANTILES:
        value = digest.quantile(share)
        if value is not None:
            family.add_sample(family.name, labels | {"quantile": f"{share:g}"}, value)
    family.add_sample(f"{family.name}_count", labels, digest.samples)
    family.add_sample(f"{family.name}_sum", labels, digest.total)
