"""The names of the activations of linear layers, and which of them are gated.

A gated activation halves the features of the layer before it: act(first half) · second half, so that the weight of that
layer has 2F rows, gate rows first. Shazeer, "GLU Variants Improve Transformer" (2020).
"""

# Gated activation → the activation of its gate.
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", *GATED)
