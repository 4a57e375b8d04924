"""The data plane: cut activations go up, their gradients come down."""
