"""`torch.compiler.config.cache_key_tag`: the caches of every backend key on the sources of this package.

No public way: a graph names an operator, and not what it computes, so a cache would return the code of another version.
Our own backend has a pass with a key. Other backends compile planned models, too.
Until: https://github.com/pytorch/pytorch/issues/144344 (the key of a custom operator covers what it does).
The same: code; the caches keep that of other models under another key.
"""

from memcompile.common.patch import Patch
from memcompile.lowering.inductor.caches import tag_caches, untag_caches


class _Tag:
    install, remove = staticmethod(tag_caches), staticmethod(untag_caches)


PATCH = Patch(_Tag())
