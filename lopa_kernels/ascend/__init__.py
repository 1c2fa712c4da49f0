"""Ascend NPUs: torchair's conversion of these operators to GE graphs.

The operators themselves are backend ``ascend`` (ascend_ops/README.md).
"""

from __future__ import annotations


def register_converters() -> None:
    """Registers a converter of every ``torch.ops.lopa`` operator with torchair.

    Call it once before ``torch.compile(..., backend=torchair.get_npu_backend())``. The operators
    that write in place (``kv_commit_`` and the like) are functionalised by torchair itself. The
    forms with ``out`` and the in-place round have no place in a GE graph, whose memory GE plans:
    their conversion is an error that names the functional form.

    Raises:
        ImportError: torchair, which comes with torch_npu, cannot be imported.
    """
    try:
        import torchair
    except ImportError as error:
        raise ImportError(
            "lopa_kernels.ascend.register_converters needs torchair, which comes with torch_npu: "
            f"{error}"
        ) from error
    from lopa_kernels.ascend import converters

    converters.register()
