"""D: tokenizer files, text and ids."""
