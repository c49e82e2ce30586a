"""Answer a file of requests: `qmix batch`. May import every room up to `engine`."""
