"""GGUF, llama.cpp's single-file form of a checkpoint, told in the words of a Hugging Face one.

container.py reads the file, config.py makes a config.json of its metadata, text.py a tokenizer.json and the
two small files beside it. `engine/model/gguf/` has the weights. Nothing behind these knows GGUF.
"""
