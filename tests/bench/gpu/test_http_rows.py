"""The HTTP bench starts the server by its command on a random pair, and measures it over HTTP."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import bench.gpu.http_rows
from bench.gpu.cases import off
from bench.gpu.http_rows import FEW, ServedRun, engine_facts, engine_facts_of, main, rows_of, steady
from bench.live_server.streams import ServerFailed, Streamed, StreamRequest
from bench.models.pair_on_disk import made_up_tokenizer, write_pair
from bench.models.random_pair import Place
from bench.models.shapes import SHAPES, TINY
from mi_runtime.embedded_pair.tokenizer import build_tokenizer
from mi_runtime.model.pair_check import check_pair
from mi_runtime.request import EngineInfo
from server.api.ready_message import describe_engine
from server.text.checkpoint import EndpointText

Rows = dict[tuple[str, str], Any]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served")
    assert main(["--smoke", "--seconds", "0", "--out", str(folder)]) == 0
    return json.loads((folder / "gpu-4b-served-smoke.json").read_text())


@pytest.fixture(scope="module")
def smoke(record: Any) -> Rows:
    """Returns the rows by what they measured and their λ."""
    return {(row["what"], row["lambdas"]): row for row in record["rows"]}


def test_a_smoke_run_serves_and_measures_everything(smoke: Rows) -> None:
    measured = ("HTTP", "HTTP in turn", "engine in turn")
    wanted = [(what, kind) for what in measured for kind in ("different", "one")]
    assert sorted(smoke) == sorted([*wanted, ("start", "one"), ("start, engine alone", "one")])
    for kind in ("different", "one"):
        assert smoke["HTTP", kind]["facts"]["first_token"]["p50"] > 0
    assert smoke["HTTP", "different"]["facts"]["ways"]["pair"] > 0


def test_the_ratio_with_a_target_compares_rounds_that_alternate(record: Any, smoke: Rows) -> None:
    ratio = record["ratios"]["4b: 64 streams over HTTP at a hot λ / the engine alone"]
    served, alone = smoke["HTTP in turn", "one"], smoke["engine in turn", "one"]
    assert ratio["value"] == pytest.approx(alone["seconds"] / served["seconds"])
    assert ratio["aim"] == 0.95


def test_the_server_and_the_engine_alone_give_the_same_answers(smoke: Rows) -> None:
    for kind in ("different", "one"):
        facts = smoke["HTTP in turn", kind]["facts"]
        assert facts["same_answers"] == facts["answers"] == FEW.count


def test_every_token_of_a_stream_is_an_event_of_its_own(smoke: Rows) -> None:
    for kind in ("different", "one"):
        facts = smoke["HTTP", kind]["facts"]
        assert facts["events"] == facts["tokens"]


# --- The pair on disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
def test_a_written_pair_passes_the_pair_check_and_has_the_models_weights(
    shape: Any, tmp_path: Path
) -> None:
    written = write_pair(shape, Place(torch.device("cpu"), torch.bfloat16, 64), tmp_path)
    pair = check_pair(*written.directories)
    assert pair.instruct.config.dtype == torch.bfloat16
    assert EndpointText.read(pair.instruct.directory).eos_token_ids == {shape.vocabulary - 3}
    for endpoint, model in ((pair.instruct, written.instruct), (pair.thinking, written.thinking)):
        stored = {name: it for path in endpoint.files for name, it in load_file(path).items()}
        own = dict(model.named_parameters())
        assert stored.keys() == own.keys()
        assert all(torch.equal(tensor, own[name]) for name, tensor in stored.items())


def test_each_made_up_token_has_unique_text_that_encodes_back() -> None:
    size = SHAPES["4b"].vocabulary
    tokenizer = Tokenizer.from_str(json.dumps(made_up_tokenizer(size)))
    assert tokenizer.get_vocab_size() == size
    ids = list(range(build_tokenizer().get_vocab_size() - 5, size - 5))
    texts = tokenizer.decode_batch([[index] for index in ids])
    assert len(set(texts)) == len(texts)
    assert all(re.fullmatch(" [a-z]{4}", text) for text in texts)
    some = ids[:: len(ids) // 50]
    assert tokenizer.encode(tokenizer.decode(some)).ids == some


def test_other_text_is_encoded_as_by_the_embedded_pairs_tokenizer() -> None:
    text = "<|im_start|>user\na=3,b=a+5. What is the sum?<|im_end|>\n<think>"
    ours = Tokenizer.from_str(json.dumps(made_up_tokenizer(512)))
    assert ours.encode(text).tokens == build_tokenizer().encode(text).tokens
    assert ours.token_to_id("</think>") == 511


# --- What the server reports ----------------------------------------------------------------------


def info_of(**choices: str) -> EngineInfo:
    numbers = dict.fromkeys(
        ("vocab_size", "max_model_len", "block_size", "num_blocks", "layers", "weight_bytes",
         "peak_bytes", "load_seconds"), 1
    )  # fmt: skip
    names = dict.fromkeys(("pair_identity", "fingerprint", "model_type", "device", "dtype"), "x")
    return EngineInfo(**names, **numbers, delta_dtype="none", **choices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("graphs", "kernels", "off_there"),
    [
        ("24 captured, in 9 s", "up to 64 rows", 0),
        ("none", "up to 64 rows", 1),
        ("24 captured, in 9 s", "off: they failed (no)", 1),
        ("none", "", 2),
        ("24 captured, in 9 s", "up to 0 rows", 1),
    ],
)
def test_graphs_and_kernels_that_the_ready_line_reports_off_are_errors_on_a_gpu(
    graphs: str, kernels: str, off_there: int
) -> None:
    info = info_of(attention="triton (8 decode steps)", graphs=graphs, pair_kernels=kernels)
    engine = engine_facts_of(
        f"Ready: x ({describe_engine(info)}profile neutral) at http://127.0.0.1:80"
    )
    assert engine == engine_facts(info)
    error = off(engine, ServedRun("4b"), "cuda").get("error", "")
    assert len(list(filter(None, error.split("; ")))) == off_there
    assert off(engine, ServedRun("4b"), "cpu") == {}


# --- Errors and streams ---------------------------------------------------------------------------


def test_a_server_that_does_not_start_is_a_row_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.gpu.http_rows, "folder_with_room", lambda size: tmp_path)
    monkeypatch.setattr(ServedRun, "flags", lambda run, pair: ["--max-num-seqs", "none"])
    (row,) = rows_of(ServedRun("4b", smoke=True), seconds=0)
    assert row["error"] == "ServerFailed: the server did not start: exit code 2"
    assert not list(tmp_path.iterdir())


def test_a_pair_without_room_for_its_files_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.gpu.http_rows, "folder_with_room", lambda size: None)
    (row,) = rows_of(ServedRun("30b-a3b"), seconds=0)
    assert re.fullmatch(r"no room for files of \d+ GB; --layers cuts them", row["skipped"])


def test_a_stream_that_ends_early_is_an_error_that_shows_its_end() -> None:
    error = b'data: {"error":{"message":"The engine process ended"}}\n\n'
    with pytest.raises(ServerFailed, match="The engine process ended"):
        Streamed(StreamRequest("x", 0.5, seed=1), 0.0, ((1.0, error),)).check()


def test_the_steady_rate_is_measured_while_all_streams_run() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":" aaaa"}}]}\n\n'
    streams = [
        Streamed(StreamRequest("x", 0.5, seed), 0.0, tuple((float(at), event) for at in moments))
        for seed, moments in enumerate([(1, 2, 3, 4), (3, 4, 5, 6)])
    ]
    assert steady(streams) == 2  # the second's first token is at 3, the first's last at 4


def test_an_event_read_in_two_pieces_has_the_time_of_the_second() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":" aaaa"}}]}\n\n'
    pieces = ((1.0, event + event[:40]), (2.0, event[40:] + event))
    streamed = Streamed(StreamRequest("x", 0.5, seed=1), 0.0, pieces)
    assert streamed.moments == [1.0, 2.0, 2.0]
    assert streamed.text == " aaaa aaaa aaaa"
