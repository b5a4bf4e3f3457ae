"""``python -m llmrecipes``."""

import sys

from llmrecipes.cli import main

sys.exit(main())
