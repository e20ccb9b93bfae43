"""How loops are compiled for the CPU, and bfloat16, which numba lacks.

A bfloat16 is the upper half of a float32: loops hold one as the 16 bits that it is, and compute in float32.
"""

from typing import no_type_check

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

# Not "contract": with it, code fresh from the compiler fuses other multiplications with additions than the same code
# read back from disk, and the first run of a machine would differ from the second in the last bits.
compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"}, error_model="numpy")


@intrinsic
@no_type_check
def float_of_bits(typing_context, bits):
    """Reinterpret 32 bits as a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
@no_type_check
def bits_of_float(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@compiled
@no_type_check
def float_of_bfloat16(bits):
    """The float32 that equals a bfloat16."""
    return float_of_bits(np.uint32(bits) << np.uint32(16))


@compiled
@no_type_check
def bfloat16_of_float(number):
    """Round to nearest, ties to even, as torch does. (A NaN is caught before it gets here.)"""
    bits = bits_of_float(number)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
