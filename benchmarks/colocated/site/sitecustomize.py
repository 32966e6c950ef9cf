"""Makes torchvision importable where its compiled extension cannot be loaded.

torchvision registers shapes of operators that the extension declares, and its import fails without them. InternVL's
preprocessing uses none of these operators, so an empty module takes the place of the one that registers them.
"""

import sys
import types

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
