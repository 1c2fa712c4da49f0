"""Dream-7B and LLaDA-8B for static shapes, a LoPA round of which is one CUDA graph."""
