"""Where models, tokenizers and data sets come from: the work directory, else the bucket, else the hub."""
