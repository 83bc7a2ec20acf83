"""What a fork server imports once for all nodes, so that none of them has to.

With its first optimizer a process imports torch's compiler, which takes longer than torch itself.
"""

import torch

torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
