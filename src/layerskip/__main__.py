"""`python -m layerskip` is `layerskip`."""

import sys

from layerskip.cli.main import main

sys.exit(main())
