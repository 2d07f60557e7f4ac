"""C++ and CUDA sources of the extension, on PyTorch's stable ABI, with their builder (``build``) and cache (``cache``).

``cpu/`` has the CPU library, ``cuda/`` the CUDA library. The folder is installed as ``vit_fast.csrc`` with the sources,
so that ``vit-fast build`` works without a checkout.
"""
