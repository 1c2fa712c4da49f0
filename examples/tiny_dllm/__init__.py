"""A small masked-diffusion language model that solves word problems, decoded with LoPA."""
