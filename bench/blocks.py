"""The blocks of networks.py, with the modules and forwards of torchvision, and one of timm."""

import functools

import torch
from torch import nn


class ConvNormActivation(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU, eps=1e-5):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        layers = [conv, nn.BatchNorm2d(outputs, eps)]
        super().__init__(*layers, *([activation(inplace=True)] if activation else []))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, squeezed, activation=nn.ReLU, scale_activation=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def _scale(self, input):
        scale = self.avgpool(input)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, input):
        scale = self._scale(input)
        return scale * input


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, channels, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs, channels, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class StochasticDepth(nn.Module):
    """Drops whole rows in training, as torchvision.ops.StochasticDepth in its mode "row"."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, input):
        if not self.training or self.p == 0.0:
            return input
        kept = torch.empty(len(input), *[1] * (input.dim() - 1), dtype=input.dtype, device=input.device)
        return input * kept.bernoulli_(1.0 - self.p).div_(1.0 - self.p)


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 and V3 and of EfficientNet: expansion, depthwise, [excitation], projection."""

    def __init__(self, inputs, hidden, outputs, kernel, stride, activation, eps=1e-5, excitation=None, p=0.0):
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        layer = functools.partial(ConvNormActivation, eps=eps)
        layers = [layer(inputs, hidden, 1, activation=activation)] if hidden != inputs else []
        layers.append(layer(hidden, hidden, kernel, stride, hidden, activation))
        layers += [excitation] if excitation else []
        layers.append(layer(hidden, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(p)

    def forward(self, input):
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result


class RegNetBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, group, excites):
        super().__init__()
        self.proj = None
        if inputs != outputs or stride != 1:
            self.proj = ConvNormActivation(inputs, outputs, 1, stride, activation=None)
        excitation = [SqueezeExcitation(outputs, round(inputs / 4))] if excites else []
        self.f = nn.Sequential(
            ConvNormActivation(inputs, outputs, 1),
            ConvNormActivation(outputs, outputs, 3, stride, outputs // group),
            *excitation,
            ConvNormActivation(outputs, outputs, 1, activation=None),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.proj is not None:
            x = self.proj(x) + self.f(x)
        else:
            x = x + self.f(x)
        return self.activation(x)


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, inputs):
        concated_features = torch.cat(inputs, 1)
        bottleneck_output = self.conv1(self.relu1(self.norm1(concated_features)))
        return self.conv2(self.relu2(self.norm2(bottleneck_output)))


class DenseBlock(nn.ModuleDict):
    def forward(self, init_features):
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class ResidualBlockOfTimm(nn.Module):
    """timm's BasicBlock with squeeze and excitation, and the shortcut of its ResNet-D."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.drop_block, self.act1 = nn.BatchNorm2d(outputs), nn.Identity(), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2, self.drop_path, self.act2 = nn.BatchNorm2d(outputs), nn.Identity(), nn.ReLU(inplace=True)
        self.fc1, self.act, self.fc2 = nn.Conv2d(outputs, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, outputs, 1)
        self.gate, self.downsample = nn.Sigmoid(), None
        if stride != 1 or inputs != outputs:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.bn2(self.conv2(x))
        x_se = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True))))
        x = x * self.gate(x_se)
        x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = x + shortcut
        return self.act2(x)
