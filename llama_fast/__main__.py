"""`python -m llama_fast` is `llama-fast`."""

import sys

from llama_fast.cli import main

sys.exit(main())
