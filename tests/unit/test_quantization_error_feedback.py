"""What an encoding loses comes back, and only where its round counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchft.quantization import Codec, ErrorFeedback, Int4, codec_names, codec_of, quantized_mean


def _values(nodes: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(nodes, n, generator=torch.Generator().manual_seed(seed))


def _round(feedback: ErrorFeedback, values: Tensor, codec: Codec, *, counts: bool = True) -> Tensor:
    sent = values.clone()
    draft = feedback.draft([sent])
    mean = quantized_mean(sent, codec, None, draft[0])
    if counts:
        feedback.commit(draft)
    return mean


def test_a_draft_changes_nothing_until_it_is_committed() -> None:
    values = _values(3, 17)
    feedback, sent = ErrorFeedback([values]), values.clone()
    draft = feedback.draft([sent])
    quantized_mean(sent, Int4(), None, draft[0])
    assert torch.equal(sent, values) and not feedback.residuals[0].any()
    feedback.commit(draft)
    assert torch.equal(feedback.residuals[0], draft[0]) and draft[0].any()
    assert torch.equal(feedback.draft([sent])[0], sent) and not torch.equal(sent, values)


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize(("nodes", "n"), [(1, 40), (2, 17), (4, 5), (5, 331)])
def test_what_is_left_is_what_should_be_said_less_what_its_chunks_said(
    codec: str, nodes: int, n: int
) -> None:
    values, by = _values(nodes, n), codec_of(codec)
    error_feedback = values.clone()
    mean = quantized_mean(values, by, None, error_feedback)
    assert torch.equal(mean, quantized_mean(values, by))  # it looks on
    chunk = -(-n // nodes)
    for node in range(nodes):
        for at, part in enumerate(values[node].split(chunk)):
            left = part - by.decode(by.encode(part[None]), len(part))[0]
            if at != node:  # its own chunk has what the mean lost too
                assert torch.equal(error_feedback[node, at * chunk :][: len(part)], left)


@pytest.mark.parametrize("codec", codec_names())
@given(seed=st.integers(0, 1000), nodes=st.integers(1, 6), n=st.integers(1, 300))
@settings(max_examples=10, deadline=None)
def test_in_the_long_run_nothing_is_lost_on_either_way(
    codec: str, seed: int, nodes: int, n: int
) -> None:
    feedback = ErrorFeedback([torch.zeros(nodes, n)])
    given, received = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(10):
        values, counts = _values(nodes, n, 10 * seed + step), step % 3 != 2
        mean = _round(feedback, values, codec_of(codec), counts=counts)
        if counts:
            given += values.double().mean(0)
            received += mean[0]
    assert torch.allclose(given, received + feedback.residuals[0].double().mean(0), atol=1e-5)


def test_a_small_number_beside_a_large_one_gets_through_in_time() -> None:
    values = torch.tensor([[7.0, 0.3]])
    feedback = ErrorFeedback([values])
    total = sum(_round(feedback, values, Int4()) for _ in range(10))
    assert isinstance(total, Tensor)
    assert total[0, 0] == pytest.approx(70, rel=0.05)
    assert 2 <= total[0, 1] <= 4
    assert Int4().decode(Int4().encode(values), 2)[0, 1] == 0


def test_residuals_do_not_grow() -> None:
    """That of a mean is fed back times the number of nodes, and divided by it again."""
    nodes, values = 12, _values(12, 1000)
    feedback = ErrorFeedback([values])
    largest = []
    for step in range(200):
        _round(feedback, _values(nodes, 1000, step), Int4())
        largest.append(feedback.residuals[0].abs().max())
    assert max(largest[100:]) < 1.5 * max(largest[:100])
    assert max(largest) < 0.5 * nodes * values.abs().max() / 7 * 2


def test_a_smaller_dtype_keeps_the_digits_that_it_cannot_send() -> None:
    values = torch.full((1, 2), 1.0, dtype=torch.bfloat16)
    feedback, total = ErrorFeedback([values]), torch.zeros(1, 2)
    feedback.residuals[0].fill_(2.0**-12)
    sent = values.clone()
    draft = feedback.draft([sent])
    total += quantized_mean(sent, codec_of("bf16"), None, draft[0])
    assert feedback.residuals[0].dtype == torch.float32
    assert torch.equal(total + draft[0], torch.full((1, 2), 1.0 + 2.0**-12))


def test_nodes_that_are_not_counted_or_not_there_are_as_in_the_long_run() -> None:
    """Members change, chunks with them: a residual belongs to a number, not to a chunk."""
    feedback = ErrorFeedback([torch.zeros(4, 100)])
    for step, members in enumerate([[0, 1, 2, 3], [0, 2], [0, 1, 2, 3]]):
        values = _values(len(members), 100, step)
        kept = feedback.residuals[0].clone()
        draft = values + kept[members]
        mean = quantized_mean(values + kept[members], Int4(), None, draft)
        feedback.residuals[0][members] = draft
        before = (values + kept[members]).double().mean(0)
        assert torch.allclose(mean[0] + draft.double().mean(0), before, atol=1e-5)


def test_values_and_residuals_that_do_not_belong_together_are_refused() -> None:
    feedback = ErrorFeedback([torch.zeros(1, 2), torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="zip"):
        feedback.draft([torch.zeros(1, 2)])
