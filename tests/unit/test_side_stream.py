"""What the background computes on a GPU beside the training loop."""

from __future__ import annotations

import threading

import pytest
import torch

from torchft.manager.side_stream import SideStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_tensors_on_the_cpu_need_no_stream() -> None:
    beside = SideStream([torch.ones(3), torch.ones(2, dtype=torch.int64)])
    with beside:
        pass
    beside.join()


@needs_gpu
def test_a_result_is_that_of_one_stream_and_the_loop_goes_on_meanwhile() -> None:
    weights = torch.ones(1 << 22, device="cuda")
    for _ in range(50):
        weights.mul_(1.01)
    expected = weights.double().sum()
    beside = SideStream([weights])

    def in_background() -> None:
        with beside:
            assert torch.cuda.current_stream() != torch.cuda.default_stream()
            weights.mul_(2)

    thread = threading.Thread(target=in_background)
    thread.start()
    torch.ones(1 << 22, device="cuda").mul_(3)  # the loop's own stream has no part in it
    thread.join()
    beside.join()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.testing.assert_close(weights.double().sum(), 2 * expected)
