"""Cross-entropy of class indices.

- `forward.py`: the loss and, in the same pass, its gradient with respect to the logits.
- `gradient.py`: that gradient times the gradient of the loss.
- `targets.py`: which targets count and what they weigh, in plain torch.
"""
