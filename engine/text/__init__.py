"""Text in, text out: tokenizer, chat template, incremental detokenizer, stop strings. No tensors, no HTTP."""
