import sys

from hires.cli import main

sys.exit(main())
