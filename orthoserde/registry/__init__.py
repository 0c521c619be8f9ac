"""What a class is called in files, and all that is known of it there.

A file names *kinds* ("package>Name"). Only a kind that this process has registered is ever built; nothing is imported.
"""

from orthoserde.registry.kinds import Registry, default_registry, register

__all__ = ["Registry", "default_registry", "register"]
