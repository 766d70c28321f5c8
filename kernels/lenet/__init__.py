"""LeNet in four launches for a training step, and in two for inference.

- `layout.py`: where parameters, packed weights, activations and partial sums lie in memory.
- `pack.py`: the first launch, which packs the weights.
- `forward.py`: the second: all layers; in training also the loss and the gradients of the linear layers' inputs.
- `gradient.py`: the third: partial sums of every weight gradient.
- `update.py`: the fourth: adds the partial sums up and updates the parameters.
- `products.py`, `products_gradient.py`: the convolutions and the weight gradients as matrix products, those of the
  linear layers in every format.
- `lanes.py`, `lanes_gradient.py`: both for convolutions in full float32, by FMA on a patch in each thread's registers.
- `linears.py`: the linear layers and the loss, inside the second launch.
- `lane_order.py`: the order of rows and columns by which operands need no shared memory.
- `tiles.py`: the tiles of the second and third launch.
"""
