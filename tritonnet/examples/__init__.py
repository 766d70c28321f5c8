"""Programs to read from top to bottom, and to run: python -m tritonnet.examples.tutorial_lenet, and the others."""
