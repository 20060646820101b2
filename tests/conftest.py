"""What all tests share."""

import torch
from hypothesis import settings

# Tiny models gain nothing from a second thread, and lose much to two processes that wait for each other.
torch.set_num_threads(1)

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("kvcc", deadline=None)
settings.load_profile("kvcc")
