"""Kernels in C++ for training on a CPU, compiled on the machine they run on; without them torch's own do."""
