"""Native kernels: the sources of csrc as backends of the ops, where a library has been built."""
