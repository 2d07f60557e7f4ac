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
``dropout``           dropout masks in kernels, by Philox
``column_sums``       sums over the rows of a matrix, in two stages
``layer_norm_bwd``    the backward of LayerNorm
``activations``       activations on a tile
``gemm``              the GEMM kernel with its epilogue and tile order
``gemm_train``        the GEMM of training: pre-activation kept, dropout, the gradient at a pre-activation
``linear``            linear layers on it: activation, LayerScale, residual, folded LayerNorm
``linear_hopper``     the same for sm_90 in Gluon; a candidate of benchmarks/tune/
``linear_bwd``        the backward of linear layers, LayerScale included
``layernorm_mlp``     LayerNorm + MLP + residual
``layernorm_mlp_bwd``  its backward
``attention``         attention on packed or separate q, k, v
``attention_bwd``     its gradients
``patch_embed``       patch embedding as an implicit GEMM
``patch_embed_bwd``   its backward: im2col and PyTorch's product, sums over images
``prepared_blocks``   transformer blocks on folded weights
``fp8_blocks``        transformer blocks in float8
``prepared_layer``    what one linear layer on a prepared weight has beside its tokens: norm, bias, activation
``prepared_linear``   that layer, in the dtype of its weight or in float8
====================  ==========================================================
"""
