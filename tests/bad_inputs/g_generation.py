"""G: the arguments of a generation request."""
