"""What each operator does on the host: checks arguments, allocates results, plans launches and launches kernels.

Arguments are those of the schemas in csrc/torch/schemas.h. A first call compiles; what it compiled serves every batch
size. Nothing is kept between calls but plans of launches.
"""

from triton.runtime.interpreter import InterpretedFunction

from fastlayers.triton import forward
from fastlayers.triton.calls.batch_norm_act import batch_norm_act_bwd, batch_norm_act_fwd
from fastlayers.triton.calls.batch_norm_act_pool import batch_norm_act_pool_bwd, batch_norm_act_pool_fwd
from fastlayers.triton.calls.copies import bytes_of_bits
from fastlayers.triton.calls.masks import dropout, element_mask, unpack_mask

__all__ = [
    "INTERPRETED",
    "batch_norm_act_bwd",
    "batch_norm_act_fwd",
    "batch_norm_act_pool_bwd",
    "batch_norm_act_pool_fwd",
    "bytes_of_bits",
    "dropout",
    "element_mask",
    "unpack_mask",
]

#: Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when they were defined.
INTERPRETED = isinstance(forward.normalise, InterpretedFunction)
