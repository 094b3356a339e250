"""Test processes that share the machine keep to a thread each; tests about threads set their own number."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
