"""Programs to read from top to bottom, and to run, such as python -m tritonnet.examples.tutorial_lenet."""
