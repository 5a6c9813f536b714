"""The Triton kernels. One file a kernel; `driver` allocates, launches and says with what parameters."""
