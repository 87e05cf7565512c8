"""What other programs need to speculate with a model's own layers."""
