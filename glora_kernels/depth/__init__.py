"""What is done for all layers of a model in one launch: merging, β, the gradients of shared factors."""
