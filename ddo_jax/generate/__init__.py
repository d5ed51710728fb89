"""Images from a model: seeds and labels, the sampler on a mesh, requests, files."""
