"""Tiny models gain nothing from a second thread, and lose much to two processes that wait for each other."""

import torch

torch.set_num_threads(1)
