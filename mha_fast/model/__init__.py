"""What a model needs around attention: products, the layer, files of weights."""
