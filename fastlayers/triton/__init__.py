"""The operators as Triton kernels, for GPUs without compiled ones: `fastlayers.triton.ops` is imported when needed."""
