"""Metrics count each request once, to its end, and read the engine's last report at the scrape."""

import time

import pytest

from mi_runtime.request import EngineStats
from server.ops.metrics import EngineState, Metrics

LABELS = {"model_name": "pair", "lambda_bucket": "0.6-0.7"}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "pair"} | labels)


def test_a_request_is_followed_to_its_end_and_counted_once() -> None:
    metrics = Metrics("pair")
    now = time.perf_counter()
    meter = metrics.meter(0.6, 30, arrived=now)
    meter.token(now + 0.05, queue_seconds=0.01, answers=False)
    meter.token(now + 0.07, queue_seconds=0.01, answers=True)
    meter.close("stop", generation_tokens=2, reasoning_tokens=1)
    meter.close("abort", generation_tokens=2, reasoning_tokens=1)

    assert value(metrics, "mi_prompt_tokens_total") == 30
    assert value(metrics, "mi_generation_tokens_total") == 2
    assert value(metrics, "mi_reasoning_tokens_total") == 1
    assert value(metrics, "mi_request_success_total", finished_reason="stop") == 1
    assert value(metrics, "mi_request_success_total", finished_reason="abort") is None
    for name, expected in [
        ("time_to_first_token_seconds", 0.05),
        ("time_to_first_answer_token_seconds", 0.07),
        ("inter_token_latency_seconds", 0.02),
        ("request_queue_time_seconds", 0.01),
        ("request_prompt_tokens", 30),
        ("request_generation_tokens", 2),
        ("request_reasoning_tokens", 1),
    ]:
        assert value(metrics, f"mi_{name}_count", **LABELS) == 1, name
        assert value(metrics, f"mi_{name}_sum", **LABELS) == pytest.approx(expected), name
    assert value(metrics, "mi_e2e_request_latency_seconds_count", **LABELS) == 1


def test_the_used_share_of_a_budget_counts_tool_calls_and_leaves_out_aborts() -> None:
    metrics = Metrics("pair")
    for reason, reasoning in (("tool_calls", 8), ("abort", 2)):
        meter = metrics.meter(0.6, 30, arrived=time.perf_counter(), cap=10)
        meter.close(reason, generation_tokens=20, reasoning_tokens=reasoning)
    text = metrics.exposition().decode()
    labels = '{lambda_bucket="0.6-0.7",model_name="pair"}'
    assert f"mi_budget_used_ratio_sum{labels} 0.8\n" in text


def test_the_engines_last_report_is_read_at_the_scrape() -> None:
    metrics = Metrics("pair")
    stats = EngineStats(
        running=2,
        waiting=1,
        used_blocks=16,
        total_blocks=64,
        running_lambdas=(0.0, 0.6),
        waiting_lambdas=(1.0,),
        prefix_queried_tokens=40,
        prefix_hit_tokens=32,
        preemptions=3,
        endpoint_executions=5,
        blended_executions=7,
        pair_executions=6,
        blend_hits=8,
        blend_builds=9,
        blend_evictions=4,
        blend_bytes=1000,
        forced_closes=2,
    )
    metrics.follow_engine(lambda: EngineState(stats, None, max_lambdas=256))
    assert value(metrics, "mi_num_requests_running") == 2
    assert value(metrics, "mi_num_requests_waiting") == 1
    assert value(metrics, "mi_kv_cache_usage_ratio") == 0.25
    assert value(metrics, "mi_prefix_cache_queries_total") == 40
    assert value(metrics, "mi_prefix_cache_hits_total") == 32
    assert value(metrics, "mi_num_preemptions_total") == 3
    for way, count in [("endpoint", 5), ("blended", 7), ("pair", 6)]:
        assert value(metrics, "mi_layer_executions_total", way=way) == count
    assert value(metrics, "mi_blend_cache_hits_total") == 8
    assert value(metrics, "mi_blend_cache_builds_total") == 9
    assert value(metrics, "mi_blend_cache_evictions_total") == 4
    assert value(metrics, "mi_blend_cache_bytes") == 1000
    assert value(metrics, "mi_forced_close_total") == 2
    lists = {"max": "256", "running": "pair@0,pair@0.6", "waiting": "pair@1"}
    assert value(metrics, "mi_lambda_blends_info", **lists) is not None


def test_two_servers_share_no_registry() -> None:
    Metrics("pair").rejected("overloaded")
    assert value(Metrics("pair"), "mi_admission_rejections_total", reason="overloaded") is None
