"""Where prompts and their pictures come from."""
