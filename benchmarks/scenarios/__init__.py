"""One module for each kind of scenario: the roles of its processes, then what the coordinator does.

Both halves are in one module because one makes no sense without the other; so all imports are of
the standard library and of this folder, which every environment has.
"""

from __future__ import annotations
