"""Check the kernel size that a block is given."""

from __future__ import annotations

from se_inject.errors import OptionError


def odd_kernel(kernel: int, largest: int = 127) -> int:
    """Return the kernel size itself, if a convolution of that size can keep the shape.

    Raises:
        OptionError: the size is even, below 1, or above ``largest``, where the block would cost more than the network.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise OptionError("a kernel that keeps the shape has an odd size", seen=f"kernel = {kernel}")
    if kernel > largest:
        raise OptionError(f"a kernel of at most {largest}", seen=f"kernel = {kernel}")
    return kernel
