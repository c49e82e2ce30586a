"""Turn text into token ids and token ids into text: tokenizer, chat template, prompts and stop strings.

May import checkpoints and every room below them."""
