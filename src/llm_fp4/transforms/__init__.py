"""Changes of a whole model that keep its float function, applied to tensors as they are read: rotation, folded norms."""

from llm_fp4.transforms.merge import Merge
from llm_fp4.transforms.roles import BlockRoles, block_roles, norm_before
from llm_fp4.transforms.rotation import Rotation

__all__ = ["BlockRoles", "Merge", "Rotation", "block_roles", "norm_before"]
