"""For all tests: one thread per operation, so that they neither compete nor differ by machine, and
no property fails because the machine is busy."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
