"""Where the method meets other people's code: finding blocks and adapters in a model, PEFT, transformers."""
