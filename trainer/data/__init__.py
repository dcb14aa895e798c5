"""Text to microbatches: tokenizers, the .bin/.idx format, sources, packing, the stateless sampler and the loader."""
