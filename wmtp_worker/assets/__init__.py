"""Where models, tokenizers and datasets come from. A first cut: the package, a path, or the work directory."""
