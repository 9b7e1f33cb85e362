"""The classes of Hugging Face's Llama documentation, over the engine."""
