"""The networks of the studies, from fastlayers' fused layers or from torch's, with the same state.

from fastlayers import models

models.CNN()                           # BatchNorm, ReLU, Dropout2d and max-pool of each block are one fused layer
models.CNN(layers="torch")             # its plain twin: the same state_dict, the same training for the same seed
models.res18(act="mish", stem=(3, 3))  # ResNet-18 for 32 x 32 images
models.build("cnn_b", drop_p=0.3)      # by name, from a config

Needs torch only. Twins with the same seed have the same weights and draw the same dropout masks, so that their training
differs by rounding alone; either loads the other's state.
"""

from fastlayers.models.cnn import CNN, cnn_a7, cnn_b, cnn_b14
from fastlayers.models.layers import LayerKit, Style, fused_layers, torch_layers
from fastlayers.models.lenet import LeNet
from fastlayers.models.mlp import MLP, mlp_a, mlp_e
from fastlayers.models.registry import MODELS, build
from fastlayers.models.resnet import ResNet, res9, res18, simp_res9
from fastlayers.models.size import count_parameters, state_mib
from fastlayers.models.vgg import VGGA

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "VGGA",
    "LayerKit",
    "LeNet",
    "ResNet",
    "Style",
    "build",
    "cnn_a7",
    "cnn_b",
    "cnn_b14",
    "count_parameters",
    "fused_layers",
    "mlp_a",
    "mlp_e",
    "res9",
    "res18",
    "simp_res9",
    "state_mib",
    "torch_layers",
]
