"""The fused operations of vit_fast, installed as ``vit_fast.kernels``.

One file is one operation: head comment, device code, launch, public function.

====================  ==========================================================
``arguments``         checks of the arguments, the same for every backend, and the errors
``activation_names``  the names of the activations, and which are gated
``block_options``     what prepared blocks have beside their weights: norms, rotary embedding, biases
``reference``         the same operations in plain PyTorch: truth and last fallback
``tracing``           which tracers and transforms of PyTorch a call runs under
``folding``           weights folded and quantised for inference
``configs``           launch configurations as data
``launch``            what all launches share: PDL, row layouts, dtypes, device guard
``interception``      launches handed to a function instead of being run
``launch_plan``       the launches of a stack of blocks, noted once and repeated
``warming``           launches compiled in threads and not run
``layer_norm``        LayerNorm over the last axis; row-statistics partials
``activations``       activations on a tile
``gemm``              the GEMM kernel with its epilogue and tile order
``linear``            linear layers on it: activation, LayerScale, residual, folded LayerNorm
``linear_hopper``     the same for sm_90 in Gluon; a candidate of benchmarks/tune/
``layernorm_mlp``     LayerNorm + MLP + residual
``attention``         attention on packed or separate q, k, v
``attention_bwd``     its gradients
``patch_embed``       patch embedding as an implicit GEMM
``prepared_blocks``   transformer blocks on folded weights
``fp8_blocks``        transformer blocks in float8
====================  ==========================================================
"""
