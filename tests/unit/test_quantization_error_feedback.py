"""What an encoding loses comes back, and only where its round counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.quantization import ErrorFeedback, Int4, codec_names

SHAPES = ((3, 17), (3, 4, 20), (3, 1))


def _values(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_a_draft_changes_nothing_until_it_is_committed() -> None:
    feedback, values = ErrorFeedback("int4"), _values()
    residuals = feedback.start(values)
    draft = feedback.draft(values, residuals)
    assert all(torch.equal(one, other) for one, other in zip(values, _values(), strict=True))
    assert all((residual == 0).all() for residual in residuals)
    feedback.commit(residuals, draft)
    decoded = feedback.decode(draft.encoded, values)
    assert (residuals[0] != 0).any()
    for value, residual, found in zip(values, residuals, decoded, strict=True):
        assert found.shape == value.shape
        assert torch.equal(residual, value - found)


@pytest.mark.parametrize("codec", codec_names())
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_in_the_long_run_nothing_is_lost(codec: str, seed: int) -> None:
    feedback = ErrorFeedback(codec)
    residuals = feedback.start(_values())
    given = [torch.zeros_like(value, dtype=torch.float64) for value in _values()]
    received = [total.clone() for total in given]
    for step in range(10):
        values = _values(10 * seed + step)
        draft = feedback.draft(values, residuals)
        if step % 3 == 2:
            continue  # this round did not count
        feedback.commit(residuals, draft)
        for total, value in zip(given, values, strict=True):
            total.add_(value)
        for total, found in zip(received, feedback.decode(draft.encoded, values), strict=True):
            total.add_(found)
    for sent, found, residual in zip(given, received, residuals, strict=True):
        assert torch.allclose(sent, found + residual, atol=1e-5)


def test_a_small_number_beside_a_large_one_gets_through_in_time() -> None:
    feedback, values = ErrorFeedback(Int4()), [torch.tensor([[7.0, 0.3]])]
    residuals, total = feedback.start(values), torch.zeros(1, 2)
    for _ in range(10):
        draft = feedback.draft(values, residuals)
        feedback.commit(residuals, draft)
        total += feedback.decode(draft.encoded, values)[0]
    assert total[0, 0] == pytest.approx(70, rel=0.05)
    assert 2 <= total[0, 1] <= 4
    assert Int4().decode(Int4().encode(values[0]), 2)[0, 1] == 0


def test_nodes_in_rows_are_as_nodes_by_themselves() -> None:
    feedback, values = ErrorFeedback("int8"), _values()
    together = feedback.draft(values, feedback.start(values))
    for node in range(3):
        alone = [value[node : node + 1] for value in values]
        draft = feedback.draft(alone, feedback.start(alone))
        for one, all_of_them in zip(draft.encoded, together.encoded, strict=True):
            assert torch.equal(one[0], all_of_them[node])
        for one, all_of_them in zip(draft.residuals, together.residuals, strict=True):
            assert torch.equal(one[0], all_of_them[node])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", codec_names())
def test_a_nan_is_sent_once_and_not_kept(codec: str, bad: float) -> None:
    feedback, values = ErrorFeedback(codec), [torch.tensor([[1.0, bad]])]
    residuals = feedback.start(values)
    draft = feedback.draft(values, residuals)
    assert not feedback.decode(draft.encoded, values)[0].isfinite().all()
    feedback.commit(residuals, draft)
    assert residuals[0].isfinite().all()


def test_values_and_residuals_that_do_not_belong_together_are_refused() -> None:
    feedback, values = ErrorFeedback("int8"), _values()
    with pytest.raises(ValueError, match="zip"):
        feedback.draft(values, feedback.start(values[:2]))
