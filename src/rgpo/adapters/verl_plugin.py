"""What verl loads from the entry point `verl.plugins`: registers every recipe, or says why not.

verl itself swallows whatever a plug-in raises, and then reports an unknown loss_mode.
"""

import sys

try:
    from rgpo.adapters import verl

    verl.register()
except Exception as error:
    print(f"rgpo: no recipe is registered with verl: {error}", file=sys.stderr)
    raise
