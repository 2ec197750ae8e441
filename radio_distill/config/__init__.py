"""Cards and recipes: YAML in, frozen values out, every error at once."""
