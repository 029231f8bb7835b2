"""Stands for mamba_ssm 2.3 where the compiled extension that its `__init__` imports is broken."""

raise ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c104impl")
