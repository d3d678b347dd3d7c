"""A batch lists the rows of its chunks: tokens, positions, KV slots, dials, logits."""

import torch

from mi_runtime.execution.batch import build_batch
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import SubBatch
from mi_runtime.scheduling.sequence import Sequence

CPU = torch.device("cpu")
BLOCK_SIZE, NULL_BLOCK = 4, 99


def sequence(
    tokens: tuple[int, ...], blocks: list[int], dial: float = 0.5, scores: int | None = None
) -> Sequence:
    sampling = SamplingParams(prompt_logprobs=scores)
    made = Sequence(EngineRequest(str(tokens[0]), tokens, Dial(dial), sampling))
    made.block_table = blocks
    return made


def test_rows_are_the_decodes_and_then_the_tokens_of_the_prefills() -> None:
    decoding = sequence((10, 11, 12, 13, 14), [7, 2], dial=0.2)
    prefilling = sequence((20, 21, 22, 23, 24, 25), [5, 3], dial=0.8)
    chunks = [Chunk(decoding, 4, 1), Chunk(prefilling, 1, 4)]
    batch = build_batch(SubBatch(chunks, blended=False), BLOCK_SIZE, NULL_BLOCK, CPU)
    assert batch.ids.tolist() == [14, 21, 22, 23, 24]
    assert batch.positions.tolist() == [4, 1, 2, 3, 4]
    assert batch.logits_indices.tolist() == [0]  # the prefill does not reach its last token
    assert batch.sampling == (decoding,)
    assert (batch.rows.dials, batch.rows.index) == ((Dial(0.2), Dial(0.8)), (0, 1, 1, 1, 1))
    assert batch.placeholders is None


def test_keys_and_values_go_to_the_slots_of_each_sequences_own_blocks() -> None:
    chunks = [
        Chunk(sequence((10, 11), [7]), 1, 1),
        Chunk(sequence((20, 21, 22, 23, 24), [5, 3]), 2, 3),
    ]
    plan = build_batch(SubBatch(chunks, blended=False), BLOCK_SIZE, NULL_BLOCK, CPU).attention
    assert plan.slot_mapping.tolist() == [7 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 3 * 4]
    assert plan.block_tables.tolist() == [[7, NULL_BLOCK], [5, 3]]
    assert plan.query_starts.tolist() == [0, 1, 4]
    assert plan.lengths.tolist() == [2, 5]
    assert (plan.decodes, plan.longest_decode, plan.longest_query, plan.longest) == (1, 2, 3, 5)


def test_scored_rows_come_before_the_rows_that_sample() -> None:
    chunks = [
        Chunk(sequence((10, 11), [7]), 1, 1),
        Chunk(sequence((20, 21, 22), [5], scores=0), 0, 3),
    ]
    batch = build_batch(SubBatch(chunks, blended=False), BLOCK_SIZE, NULL_BLOCK, CPU)
    assert batch.logits_indices.tolist() == [1, 2, 0, 3]
    assert batch.scored == (chunks[1],)


def test_a_token_that_is_not_known_yet_is_a_placeholder_for_a_row_of_the_step_in_flight() -> None:
    ahead = sequence((10, 11), [7])
    chunks = [Chunk(sequence((20, 21), [5]), 1, 1), Chunk(ahead, 2, 1)]
    sub_batch = SubBatch(chunks, blended=False)
    batch = build_batch(sub_batch, BLOCK_SIZE, NULL_BLOCK, CPU, sampled_rows={ahead: 3})
    assert batch.placeholders is not None
    assert batch.ids.tolist() == [21, 0]
    assert (batch.placeholders.rows.tolist(), batch.placeholders.sampled_rows.tolist()) == (
        [1],
        [3],
    )


def test_every_row_of_a_chunk_in_which_the_dial_switches_has_its_own_dial() -> None:
    request = EngineRequest("r", (3, 4, 5, 6), Dial(0.5), answer_dial=Dial(0.1))
    switched = Sequence(request)
    switched.switch_at, switched.block_table = 2, [0]
    sub_batch = SubBatch([Chunk(switched, 0, 4)], blended=False)
    rows = build_batch(sub_batch, BLOCK_SIZE, NULL_BLOCK, CPU).rows
    assert (rows.dials, rows.index) == ((Dial(0.5), Dial(0.1)), (0, 0, 1, 1))
