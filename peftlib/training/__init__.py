"""Training: layer groups, gradual unfreezing, learning rates, and loss terms."""
