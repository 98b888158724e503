"""Kinds of layers and functions, by how a cohort's rows may go through them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
ACTIVATIONS = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
#: Functions that are an `nn.ReLU`.
RELUS = (F.relu, torch.relu)
#: Layers without weights or draws that treat every row alike.
PLAIN = (
    nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh,
    nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink, nn.GLU,
    nn.Threshold, nn.Softmax, nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool3d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.Upsample, nn.ZeroPad2d,
    nn.PixelShuffle, nn.Unflatten, nn.LocalResponseNorm, nn.Softmax2d,
)  # fmt: skip
#: Functions and tensor methods of which the same is true; the check decides in case of doubt.
FUNCTIONS = {
    "relu", "gelu", "tanh", "sigmoid", "silu", "elu", "leaky_relu", "softplus", "softmax",
    "log_softmax", "flatten", "reshape", "view", "transpose", "permute", "unsqueeze", "squeeze",
    "mean", "sum", "amax", "amin", "cat", "concat", "stack", "add", "iadd", "sub", "isub", "mul",
    "imul", "truediv", "div", "neg", "pow", "exp", "log", "sqrt", "rsqrt", "abs", "clamp", "matmul",
    "getitem", "getattr", "arange", "size", "contiguous", "float", "chunk", "split", "unflatten",
    "max_pool1d", "avg_pool2d", "avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool1d",
    "scaled_dot_product_attention", "normalize", "hardtanh", "relu6", "square", "sin", "cos", "dim",
    "mul_", "add_", "floordiv", "expand", "repeat", "hardswish", "mish", "logsigmoid", "triu",
    "ones", "zeros", "full", "to", "type_as", "log1p", "movedim", "swapaxes", "expand_as",
}  # fmt: skip
ELEMENTWISE = {"add", "iadd", "sub", "isub", "mul", "imul", "truediv", "div", "pow"}
RESHAPING = {"flatten", "reshape", "view", "unsqueeze", "squeeze", "unflatten", "contiguous"}
