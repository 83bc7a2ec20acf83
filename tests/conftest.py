"""For all tests: one thread per operation, so that they neither compete nor differ by machine."""

import torch

torch.set_num_threads(1)
