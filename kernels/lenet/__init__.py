"""LeNet's launches."""
