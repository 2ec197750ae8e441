"""One stage of a distillation: frozen teachers -> targets -> student and heads -> losses -> step."""
