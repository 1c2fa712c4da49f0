"""``python -m lopa_kernels``: versions, devices, and which backends are present, or why not."""

from lopa_kernels.collect_env import summary

print(summary())
