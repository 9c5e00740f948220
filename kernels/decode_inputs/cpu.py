"""The CPU backend of `decode_inputs`: the reference."""

from kernels.decode_inputs.reference import decode_inputs as decode_inputs
