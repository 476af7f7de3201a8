"""CUDA C++ that is compiled on the user's machine at run time, and how it is launched on torch's stream.

half2.cuh     pairs of float16 in a register, by inline PTX: no CUDA header is needed to compile
trellis.cuh   state -> value, and a lane's part of a tile
compile.py    NVRTC through cuda-core, one compilation per kernel, constants and GPU kind
"""

from ernieq.kernels.cuda.compile import CudaKernel, cuda_kernel

__all__ = ["CudaKernel", "cuda_kernel"]
