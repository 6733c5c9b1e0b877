"""The GPU's kernels in Triton's interpreter, on the CPU. `test_interpreter.py`, beside this folder, runs these tests in
processes where TRITON_INTERPRET=1: Triton reads it when it is imported.
"""
