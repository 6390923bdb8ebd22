from ._build import build as build
from ._catalog import ARCHITECTURES as ARCHITECTURES
from ._catalog import Architecture as Architecture
from ._catalog import architecture as architecture
from ._catalog import names as names
from ._convnet import ConvNet as ConvNet
from ._efficientnet_lite0 import EfficientNetLite0 as EfficientNetLite0
from ._fastnet import FastNet as FastNet
from ._fastnet import whiten as whiten
from ._features import FeatureTap as FeatureTap
from ._features import features as features
from ._forward import as_input as as_input
from ._forward import device_of as device_of
from ._forward import forward as forward
from ._forward import logits_in as logits_in
from ._forward import logits_of as logits_of
from ._layout import fastest_layout as fastest_layout
from ._mobilenet_v2 import MobileNetV2 as MobileNetV2
from ._normalized import Normalized as Normalized
from ._preserved import preserved as preserved
from ._pretrained import pretrained as pretrained
from ._reinitialized import reinitialized as reinitialized
from ._resnet import ResNet as ResNet
from ._resnet9 import ResNet9 as ResNet9
from ._vgg import VGG as VGG

__all__ = [
    "ARCHITECTURES",
    "VGG",
    "Architecture",
    "ConvNet",
    "EfficientNetLite0",
    "FastNet",
    "FeatureTap",
    "MobileNetV2",
    "Normalized",
    "ResNet",
    "ResNet9",
    "architecture",
    "as_input",
    "build",
    "device_of",
    "fastest_layout",
    "features",
    "forward",
    "logits_in",
    "logits_of",
    "names",
    "preserved",
    "pretrained",
    "reinitialized",
    "whiten",
]
