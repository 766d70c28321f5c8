"""Networks of the papers on torch.nn, with torchvision's modules and forwards, and one with timm's.

Each takes `width`, which scales all channels, `depth`, which scales the number of blocks of each stage, and `stages`,
of which there are that many. By default a network is the paper's, and has the published number of parameters
(PARAMETERS). Names in its state_dict are not torchvision's.

Sources: ResNet https://arxiv.org/abs/1512.03385 (the stride of a bottleneck in its 3x3), VGG 1409.1556, MobileNetV2
1801.04381, MobileNetV3 1905.02244, EfficientNet 1905.11946, RegNet 2003.13678, DenseNet 1608.06993, and for timm's
network the variant D of 1812.01187.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import (
    BasicBlock,
    Bottleneck,
    ConvNormActivation,
    DenseBlock,
    DenseLayer,
    InvertedResidual,
    RegNetBlock,
    ResidualBlockOfTimm,
    SqueezeExcitation,
)

# (channels of the 3x3, blocks) of each stage of a ResNet.
RESNET_18, RESNET_50 = ((64, 2), (128, 2), (256, 2), (512, 2)), ((64, 3), (128, 4), (256, 6), (512, 3))
VGG_16 = (64, 2), (128, 2), (256, 3), (512, 3), (512, 3)  # channels, convolutions
# Expansion, kernel, stride of the first block, channels, blocks.
MOBILENET_V2 = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 3, 2, 32, 3), (6, 3, 2, 64, 4), (6, 3, 1, 96, 3), (6, 3, 2, 160, 3),
    (6, 3, 1, 320, 1),
)  # fmt: skip
EFFICIENTNET_B0 = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip
# Kernel, channels of the depthwise convolution in each block, channels, squeeze and excitation, hardswish, stride.
MOBILENET_V3 = (
    (3, (16,), 16, False, False, 1), (3, (64, 72), 24, False, False, 2), (5, (72, 120, 120), 40, True, False, 2),
    (3, (240, 200, 184, 184), 80, False, True, 2), (3, (480, 672), 112, True, True, 1),
    (5, (672, 960, 960), 160, True, True, 2),
)  # fmt: skip
REGNET_X_400MF, REGNET_Y_400MF = ((32, 1), (64, 2), (160, 7), (400, 12)), ((48, 1), (104, 3), (208, 6), (440, 6))
DENSENET_121 = 6, 12, 24, 16


def scaled(channels, width):
    """`width` times as many channels: a multiple of 8, and no more than a tenth fewer than asked for."""
    found = max(8, int(channels * width + 4) // 8 * 8)
    return found + 8 if found < 0.9 * channels * width else found


def repeated(blocks, depth):
    return math.ceil(blocks * depth)


class Classifier(nn.Module):
    """Features, pooling to a pixel, and a classifier."""

    def __init__(self, features, classifier):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x):
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class ResNet(nn.Module):
    def __init__(self, block, table, width=1, depth=1, stages=None, classes=1000):
        super().__init__()
        inputs = scaled(64, width)
        self.conv1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        layers = []
        for i, (channels, blocks) in enumerate(table[:stages]):
            channels = scaled(channels, width)
            outputs = channels * block.expansion
            for stride in [2 if i else 1] + [1] * (repeated(blocks, depth) - 1):
                downsample = None
                if stride != 1 or inputs != outputs:
                    downsample = ConvNormActivation(inputs, outputs, 1, stride, activation=None)
                layers.append(block(inputs, channels, stride, downsample))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layers(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class VGG(nn.Module):
    def __init__(self, width=1, depth=1, stages=None, classes=1000):
        super().__init__()
        layers, inputs, hidden = [], 3, scaled(4096, width)
        for channels, convolutions in VGG_16[:stages]:
            for _ in range(repeated(convolutions, depth)):
                outputs = scaled(channels, width)
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 7 * 7, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(True),
            nn.Dropout(), nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x):
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def _inverted(table, activation, excites, width, depth, stages, classes):
    """MobileNetV2, or EfficientNet, whose blocks have an excitation and are dropped at random in training."""
    inputs, last = scaled(32, width), scaled(1280, width)
    features = [ConvNormActivation(3, inputs, stride=2, activation=activation)]
    for expansion, kernel, first, channels, blocks in table[:stages]:
        outputs = scaled(channels, width)
        for stride in [first] + [1] * (repeated(blocks, depth) - 1):
            hidden, squeezed = inputs * expansion, functools.partial(activation, inplace=True)
            excitation = SqueezeExcitation(hidden, inputs // 4, squeezed) if excites else None
            p = 0.1 if excites else 0.0
            features.append(InvertedResidual(inputs, hidden, outputs, kernel, stride, activation, 1e-5, excitation, p))
            inputs = outputs
    features.append(ConvNormActivation(inputs, last, 1, activation=activation))
    return Classifier(features, [nn.Dropout(0.2), nn.Linear(last, classes)])


def mobilenet_v2(width=1, depth=1, stages=None, classes=1000):
    return _inverted(MOBILENET_V2, nn.ReLU6, False, width, depth, stages, classes)


def efficientnet_b0(width=1, depth=1, stages=None, classes=1000):
    return _inverted(EFFICIENTNET_B0, nn.SiLU, True, width, depth, stages, classes)


def mobilenet_v3(width=1, depth=1, stages=None, classes=1000):
    inputs, eps = scaled(16, width), 1e-3
    features = [ConvNormActivation(3, inputs, stride=2, activation=nn.Hardswish, eps=eps)]
    for kernel, hiddens, channels, excites, hardswish, first in MOBILENET_V3[:stages]:
        outputs = scaled(channels, width)
        for i, hidden in enumerate(hiddens[: repeated(len(hiddens), depth)]):
            hidden = scaled(hidden, width)
            excitation = SqueezeExcitation(hidden, scaled(hidden // 4, 1), scale_activation=nn.Hardsigmoid)
            features.append(InvertedResidual(
                inputs, hidden, outputs, kernel, 1 if i else first, nn.Hardswish if hardswish else nn.ReLU, eps,
                excitation if excites else None,
            ))  # fmt: skip
            inputs = outputs
    hidden, last = 6 * inputs, scaled(1280, width)
    features.append(ConvNormActivation(inputs, hidden, 1, activation=nn.Hardswish, eps=eps))
    return Classifier(
        features, [nn.Linear(hidden, last), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(last, classes)]
    )


def regnet(table, group, excites, width=1, depth=1, stages=None, classes=1000):
    """RegNet X, or with `excites` RegNet Y; `group` channels in each group of the 3x3."""
    inputs = scaled(32, width)
    features = [ConvNormActivation(3, inputs, stride=2)]
    for channels, blocks in table[:stages]:
        outputs = max(group, round(channels * width / group) * group)
        for stride in [2] + [1] * (repeated(blocks, depth) - 1):
            features.append(RegNetBlock(inputs, outputs, stride, group, excites))
            inputs = outputs
    return Classifier(features, [nn.Linear(inputs, classes)])


class DenseNet(nn.Module):
    def __init__(self, width=1, depth=1, stages=None, classes=1000):
        super().__init__()
        growth, channels = scaled(32, width), scaled(64, width)
        layers = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
                  nn.MaxPool2d(3, 2, 1)]  # fmt: skip
        for i, count in enumerate(DENSENET_121[:stages]):
            if i:
                layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
                           nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2, 2)]  # fmt: skip
                channels //= 2
            count = repeated(count, depth)
            of_block = {f"denselayer{j + 1}": DenseLayer(channels + j * growth, growth) for j in range(count)}
            layers.append(DenseBlock(of_block))
            channels += count * growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x):
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


class ResNetOfTimm(nn.Module):
    def __init__(self, width=1, depth=1, stages=None, classes=1000):
        super().__init__()
        inputs = scaled(64, width)
        self.conv1, self.bn1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False), nn.BatchNorm2d(inputs)
        self.act1, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        blocks = []
        for i, (channels, count) in enumerate(RESNET_18[:stages]):
            for stride in [2 if i else 1] + [1] * (repeated(count, depth) - 1):
                blocks.append(ResidualBlockOfTimm(inputs, scaled(channels, width), stride))
                inputs = scaled(channels, width)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes) if classes else nn.Identity()

    def forward(self, x):
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.blocks(x)
        return self.fc(x.mean((2, 3)))


# Functions of width, depth, stages and classes.
NETWORKS = {
    "resnet18": functools.partial(ResNet, BasicBlock, RESNET_18),
    "resnet50": functools.partial(ResNet, Bottleneck, RESNET_50),
    "vgg16_bn": VGG,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet_b0": efficientnet_b0,
    "regnet_x_400mf": functools.partial(regnet, REGNET_X_400MF, 16, False),
    "regnet_y_400mf": functools.partial(regnet, REGNET_Y_400MF, 8, True),
    "densenet121": DenseNet,
    "resnet_of_timm": ResNetOfTimm,
}
# The published numbers of parameters; the network in timm's manner is none of the papers'.
PARAMETERS = {
    "resnet18": 11_689_512, "resnet50": 25_557_032, "vgg16_bn": 138_365_992, "mobilenet_v2": 3_504_872,
    "mobilenet_v3": 5_483_032, "efficientnet_b0": 5_288_548, "regnet_x_400mf": 5_495_976,
    "regnet_y_400mf": 4_344_144, "densenet121": 7_978_856,
}  # fmt: skip


@torch.no_grad()
def settle(model, images, seed=0):
    """Gives a network the weights and statistics of one that was trained, and sets it to evaluation.

    Fresh batch norms hide mistakes: they scale by 1 and shift by 0. Here scale and shift are random, and the running
    statistics are near those of `images`, so that values neither vanish nor overflow in a deep network.
    """
    generator = torch.Generator(images.device).manual_seed(seed)

    def draw(like, low, high):
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    for norm in norms:
        norm.weight.copy_(draw(norm.weight, 0.5, 1.5))
        norm.bias.copy_(draw(norm.bias, -0.5, 0.5))
        norm.train().momentum = 1.0
    model(images)
    for norm in norms:
        norm.eval().momentum = 0.1
        norm.running_mean += draw(norm.running_mean, -0.2, 0.2) * norm.running_var.sqrt()
        norm.running_var *= draw(norm.running_var, 0.7, 1.4)
    return model
