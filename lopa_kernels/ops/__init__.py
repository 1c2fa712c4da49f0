from lopa_kernels import _load

# Every schema lives in this library: without it there is nothing to register a fake for.
_load.require("lopa_cpu")
