"""Times the GPU kernels; `python -m benchmarks.kernels --help`."""
