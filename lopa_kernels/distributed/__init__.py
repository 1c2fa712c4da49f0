"""Branch parallelism: the branches of a sequence spread over the ranks of a process group.

docs/distributed.md has the protocol, the failures and a decoder.
"""

from lopa_kernels.distributed.branch_parallel import BranchParallel
from lopa_kernels.distributed.groups import Groups, make_groups
from lopa_kernels.distributed.partition import Partition
from lopa_kernels.distributed.watch import BranchParallelError

__all__ = ["BranchParallel", "BranchParallelError", "Groups", "Partition", "make_groups"]
