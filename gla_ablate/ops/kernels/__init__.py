"""The Triton kernels. `driver` says what runs when, `call` how it is launched, `tuning` with what parameters."""
