"""The gradient of each image in a batch, all at once: torch.func's vmap and grad work with the kernels.

python -m tritonnet.examples.per_sample_gradients
"""

import torch
from torch.func import functional_call, grad, vmap

import tritonnet
import tritonnet.nn.functional as F
from tritonnet.data import load_digits


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels, *_ = (t[:16].to(device) for t in load_digits())
    # float64, so that rounding cannot hide a difference between the gradients.
    net, images = tritonnet.LeNet().to(device).double(), images.double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(net, parameters, (image[None],)), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)

    one_by_one = [grad(loss)(parameters, image, label) for image, label in zip(images, labels)]
    for name, gradients in per_sample.items():
        torch.testing.assert_close(gradients, torch.stack([single[name] for single in one_by_one]))
        print(f"{name:14} {str(tuple(gradients.shape)):20} as one by one")

    norms = torch.stack([g.flatten(1).norm(dim=1) for g in per_sample.values()]).norm(dim=0)
    print(f"the image to learn most from is number {norms.argmax()}, a {labels[norms.argmax()]}")


if __name__ == "__main__":
    main()
